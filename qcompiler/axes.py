"""Axes: which channels of a program's values must be transformed together; the rules are in axis_rules.py.

Every channel of every value gets a label: an int64 tensor shaped like the value, its dynamic sizes (batch, sequence)
1. Operators that move channels about (reshape, transpose, split, ...) move the labels by running on them; the others
have a rule that ties labels (elementwise operators), starts new ones (a linear layer's output), keeps channels inside
their head (attention), or fixes them, with a reason. Labels that are tied end up as one class; `sites.py` makes sites
of the classes. Four analyses share the rules:

- PERMUTE: channels may change places.
- SCALE: a channel may be multiplied by a positive factor that its readers divide by.
- ROTATE: channels may be mixed by an orthogonal matrix.
- SIGN: a channel may be multiplied by -1, as its readers are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from qcompiler.errors import No
from qcompiler.program import Program, Type
from qcompiler.text import target_name

FIXED, NONE = 0, -1  # the label of channels that must stay as they are; of values that are no channels at all


class Kind(Enum):
    """What is done to channels."""

    PERMUTE = "permute"
    SCALE = "scale"
    ROTATE = "rotate"
    SIGN = "sign"

    @property
    def is_factor(self) -> bool:
        """Whether each channel has a factor of its own, which no block holds it to."""
        return self in (Kind.SCALE, Kind.SIGN)


@dataclass(frozen=True)
class Use:
    """One stored tensor's channels: `labels` of the elements along `axis`, or of all elements (axis None).

    `power` is 1 where a factor s of the channel multiplies the tensor (it makes the channel), -1 where it divides.
    `apart` are labels of an axis that are not those of its own channels: of those a depthwise filter reads.
    """

    tensor: str
    axis: int | None
    labels: Tensor
    power: int = 1
    apart: bool = False

    @property
    def key(self) -> tuple[str, int | None, bool]:
        """Which channels of which tensor."""
        return self.tensor, self.axis, self.apart

    def __str__(self) -> str:
        side = {None: "", 0: " filters" if self.apart else " rows", 1: " columns"}.get(self.axis, f" axis {self.axis}")
        return f"{self.tensor}{side}"


@dataclass
class Axes:
    """The labels of one program, for one kind of transform; `axis_rules.analyze` fills it.

    A label and its inverse (a key's channel, for the query's factor s, is divided by s) are two nodes of one relation:
    2 * label and 2 * label + 1.
    """

    program: Program
    kind: Kind
    count: int = 1
    env: dict[fx.Node, Any] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)  # each [block, channels]: a channel stays in its block
    fixed: list[tuple[Tensor, No]] = field(default_factory=list)
    pinned: dict[str, No] = field(default_factory=dict)  # stored tensors that something reads in a way of its own
    _ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _axes: dict[tuple[str, int | None, bool], Tensor] = field(default_factory=dict)
    _known: set[tuple[str, int | None, int]] = field(default_factory=set)

    # -- what rules do -----------------------------------------------------------------------------------------

    def fresh(self, *shape: int) -> Tensor:
        """New labels."""
        size = torch.Size(shape).numel()
        labels = torch.arange(self.count, self.count + size).view(shape)
        self.count += size
        return labels

    def tie(self, a: Tensor, b: Tensor, inverse: bool = False) -> None:
        """Make the labels of two tensors, broadcast against each other, one (or, for scales, each other's inverse)."""
        a, b = torch.broadcast_tensors(a, b)
        known = (a != NONE) & (b != NONE) & (a != b)
        self._ties.append((2 * a[known], 2 * b[known] + int(inverse and self.kind is Kind.SCALE)))

    def read(self, x: Tensor, columns: Tensor) -> None:
        """Tie a weight's columns to what they read; a value that has no channels stays as it is."""
        self.tie(torch.where(x == NONE, FIXED, x), columns)

    def fix(self, labels: Any, reason: str, node: fx.Node) -> None:
        """These channels must stay as they are."""
        for value in leaves(labels):
            if isinstance(value, (Stored, Picked)):
                self.pinned[value.name] = No(reason, place(node))
                continue
            free = value[value > FIXED]
            if len(free):
                self._ties.append((2 * free, torch.zeros_like(free)))
                self.fixed.append((free, No(reason, place(node))))

    def block(self, labels: Tensor) -> None:
        """Channels [..., channels] stay in their row."""
        if not self.kind.is_factor and labels.shape[-1] > 1:
            self.blocks.append(labels.reshape(-1, labels.shape[-1]))

    def stored(self, name: str, axis: int | None, power: int = 1, apart: bool = False) -> Tensor:
        """The labels of a stored tensor's channels: along an axis, or of every element.

        `apart` are second labels of an axis, one for each of the first: of the channels that a filter reads.
        """
        tensor = self.program.tensors[name]
        shape = tuple(tensor.shape) if axis is None else (tensor.shape[axis],)
        labels = self._axes.get((name, axis, apart))
        if labels is None:
            labels = self._axes[name, axis, apart] = self.fresh(*shape)
        if (name, axis, power) not in self._known:
            self._known.add((name, axis, power))
            self.uses.append(Use(name, axis, labels, power, apart))
        return labels

    def type_of(self, node: fx.Node) -> tuple[int, ...]:
        """A value's shape, dynamic sizes 1."""
        kind = node.meta["type"]
        return shape_of(kind) if isinstance(kind, Type) else ()

    def unknown(self, node: fx.Node, reason: str = "") -> Any:
        """What no rule speaks for: all that goes in is fixed, and so is what comes out."""
        self.fix(
            [self.env.get(n) for n in node.all_input_nodes], reason or f"{target_name(node.target)} reads it", node
        )
        kind = node.meta.get("type")
        if isinstance(kind, tuple):
            return [settled(shape_of(part)) if isinstance(part, Type) else None for part in kind]
        return settled(shape_of(kind)) if isinstance(kind, Type) else None

    def settle(self, node: fx.Node) -> None:
        """Fix the stored tensors that are used in ways which cannot be rewritten together."""
        for name in {use.tensor for use in self.uses}:
            uses = [use for use in self.uses if use.tensor == name]
            whole = {use.axis is None for use in uses}
            powers = {key: {use.power for use in uses if use.key == key} for key in {use.key for use in uses}}
            for use in uses:
                if name in self.pinned or len(whole) > 1:
                    why = self.pinned.get(name, No("it is used as a matrix and as numbers", name))
                    self.fix(use.labels.flatten(), why.reason, node)
                elif self.kind is Kind.SCALE and len(powers[use.key]) > 1:
                    self.fix(use.labels.flatten(), f"{name} both makes and reads the channels", node)

    # -- what is read from it ----------------------------------------------------------------------------------

    def classes(self) -> tuple[Tensor, Tensor]:
        """The class of each label (0 for those that are fixed), and whether it is the class's factor or its inverse.

        Both int64 [labels]; the second is 1 or -1.
        """
        ties = [(torch.tensor([0]), torch.tensor([1])), *self._ties]
        a, b = (torch.cat([tie[side].flatten() for tie in ties]) for side in (0, 1))
        a, b = torch.cat([a, a ^ 1]), torch.cat([b, b ^ 1])  # a tie of labels is one of their inverses too
        matrix = coo_matrix((torch.ones(len(a)).numpy(), (a.numpy(), b.numpy())), shape=(2 * self.count,) * 2)
        found = torch.from_numpy(connected_components(matrix, directed=False)[1]).long().view(-1, 2)
        still = found[:, 0] == found[:, 1]  # s = 1 / s leaves 1 alone
        return torch.where(still, 0, found.amin(1) + 1), torch.where(found[:, 0] <= found[:, 1], 1, -1)


@dataclass(frozen=True)
class Stored:
    """A stored tensor that no rule has read yet: how it is read says which of its channels are whose."""

    name: str


@dataclass(frozen=True)
class Picked:
    """Matrices picked from a stored stack [experts, n, k], one for each position; all experts share their channels."""

    name: str


def shape_of(kind: Type) -> tuple[int, ...]:
    """A type's shape, dynamic sizes 1."""
    return tuple(1 if isinstance(size, str) else size for size in kind.shape)


def settled(shape: tuple[int, ...]) -> Tensor:
    """Labels of a value whose channels, if it has any, stay as they are."""
    return torch.full(shape, NONE if torch.Size(shape).numel() == 1 else FIXED)


def place(node: fx.Node) -> str:
    """Where a node stands, for a reader."""
    return str(node.meta.get("path") or node.name)


def leaves(value: Any) -> Iterable[Any]:
    """The labels and stored tensors among a node's operands."""
    if isinstance(value, (Tensor, Stored, Picked)):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)


def labels_of(axes: Axes, argument: Any) -> Tensor:
    """The labels of an operand; those of a stored tensor are of its elements, those of a number none."""
    value = axes.env.get(argument) if isinstance(argument, fx.Node) else None
    if isinstance(value, Stored):
        tensor = axes.program.tensors[value.name]
        return axes.stored(value.name, None) if tensor.numel() > 1 else torch.tensor(NONE)
    if isinstance(value, Picked):
        axes.pinned[value.name] = No("its experts are used in a way without a rule", value.name)
        return torch.full(axes.type_of(argument), FIXED)
    return value if isinstance(value, Tensor) else torch.tensor(NONE)
