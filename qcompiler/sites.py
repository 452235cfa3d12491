"""Sites: channels that must be transformed together, and the weights that absorb the transform.

`find(program, kind)` derives them from the graph (see axes.py); no architecture is named anywhere. A site's transform
rewrites stored tensors only: the graph stays as it is, and so does the function.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx

from qcompiler.axes import Axes, Kind, Use
from qcompiler.axis_rules import analyze
from qcompiler.errors import No, QCompilerError
from qcompiler.program import Program

__all__ = ["Kind", "Site", "find", "find_with_ends"]


@dataclass(frozen=True)
class Site:
    """Channels that are transformed together.

    `blocks` x `channels` of them: a transform stays within a block (a head), and one block is like another.
    `uses` are the stored tensors that take it up; `positions[i]`, int64 [blocks, copies, channels], says where use i
    holds the channels: more than one copy where heads share a key, or tensors an angle. `exponents[i]`, of the same
    shape, is -1 where a factor divides. `seen`, by the name of a node, says where its value holds the channels, among
    its elements [blocks, copies, channels] in row-major order, dynamic sizes left out (for those that were asked for).
    """

    kind: Kind
    uses: tuple[Use, ...]
    positions: tuple[Tensor, ...]
    exponents: tuple[Tensor, ...]
    seen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """How many blocks of channels there are."""
        return self.positions[0].shape[0]

    @property
    def channels(self) -> int:
        """How many channels a block has."""
        return self.positions[0].shape[2]

    def __str__(self) -> str:
        size = f"{self.blocks} x {self.channels}" if self.blocks > 1 else f"{self.channels}"
        return f"{self.kind.value} {size} channels: {', '.join(map(str, self.uses))}"

    def permute(self, program: Program, index: Tensor) -> None:
        """Bring channel `index[b, i]` of block b to place i; index is int64 [blocks, channels]."""
        self._admits(Kind.PERMUTE, index, (self.blocks, self.channels))
        if not torch.equal(index.sort(-1).values, torch.arange(self.channels).expand_as(index)):
            raise QCompilerError(f"an index must hold each of 0 to {self.channels - 1} once in every block of {self}")
        for use, places in zip(self.uses, self.positions, strict=True):
            tensor = program.tensors[use.tensor]
            flat = tensor.reshape(-1) if use.axis is None else tensor.movedim(use.axis, 0)
            order = torch.arange(flat.shape[0])
            order[places] = places.gather(2, index[:, None].expand_as(places))
            self._store(program, use, flat[order], tensor)

    def scale(self, program: Program, factors: Tensor) -> None:
        """Multiply the channels by factors [blocks, channels] > 0; what reads them divides."""
        self._admits(Kind.SCALE, factors, (self.blocks, self.channels))
        if not bool((torch.isfinite(factors) & (factors > 0)).all()):
            raise QCompilerError(f"factors must be finite and positive, at {self}")
        for use, places, exponents in zip(self.uses, self.positions, self.exponents, strict=True):
            tensor = program.tensors[use.tensor]
            flat = tensor.reshape(-1) if use.axis is None else tensor.movedim(use.axis, 0)
            whole = torch.ones(flat.shape[0], dtype=factors.dtype)
            whole[places] = factors[:, None].expand(places.shape) ** (use.power * exponents)
            scaled = flat * whole.to(flat.dtype).view(-1, *[1] * (flat.dim() - 1))
            self._store(program, use, scaled, tensor)

    def flip(self, program: Program, signs: Tensor) -> None:
        """Multiply the channels by signs [blocks, channels], each 1 or -1; what reads them does, too."""
        self._admits(Kind.SIGN, signs, (self.blocks, self.channels))
        if not bool((signs.abs() == 1).all()):
            raise QCompilerError(f"signs must be 1 or -1, at {self}")
        signs = signs.double()
        self.rewrite(program, lambda values: torch.einsum("bi,bci...->bci...", signs, values))

    def rotate(self, program: Program, matrix: Tensor) -> None:
        """Mix the channels, in float64: y = R x with an orthogonal matrix [blocks or 1, channels, channels]."""
        matrix = matrix.double().expand(self.blocks, -1, -1)
        self._admits(Kind.ROTATE, matrix, (self.blocks, self.channels, self.channels))
        unit = torch.eye(self.channels, dtype=matrix.dtype)
        if not torch.allclose(matrix @ matrix.mT, unit.expand_as(matrix), atol=1e-4):
            raise QCompilerError(f"a rotation must be orthogonal, at {self}")
        self.rewrite(program, lambda values: torch.einsum("bij,bcj...->bci...", matrix, values))

    def rewrite(self, program: Program, change: Callable[[Tensor], Tensor], power: int = 0) -> None:
        """Put `change(values)` in the place of the values [blocks, copies, channels, ...], float64, of each use.

        With a power, of those uses only: 1 are what makes the channels, -1 what reads them. What is exact is the
        caller's to know.
        """
        for use, places in zip(self.uses, self.positions, strict=True):
            if power in (0, use.power):
                tensor = program.tensors[use.tensor]
                flat = (tensor.reshape(-1) if use.axis is None else tensor.movedim(use.axis, 0)).clone()
                flat[places] = change(flat[places].double()).to(flat.dtype)
                self._store(program, use, flat, tensor)

    def _admits(self, kind: Kind, given: Tensor, shape: tuple[int, ...]) -> None:
        if self.kind is not kind:
            raise QCompilerError(f"this is a site to {self.kind.value}, not to {kind.value}: {self}")
        if tuple(given.shape) != shape:
            raise QCompilerError(f"{list(shape)} is the shape to give, not {list(given.shape)}, at {self}")

    def _store(self, program: Program, use: Use, flat: Tensor, like: Tensor) -> None:
        whole = flat.view(like.shape) if use.axis is None else flat.movedim(0, use.axis)
        program.tensors[use.tensor] = whole.contiguous()
        program.codes.pop(use.tensor, None)  # they were those of the tensor as it came


def find(program: Program, kind: Kind, values: Sequence[fx.Node] = ()) -> list[Site]:
    """All sites of a canonical program for one kind of transform, in the order of its graph.

    Each says where the `values` hold its channels (`Site.seen`).
    """
    return list(_sites(analyze(program, kind), values))


def find_with_ends(program: Program, kind: Kind) -> tuple[list[Site], list[No]]:
    """All sites, and why other channels are not free: each reason once a place."""
    axes = analyze(program, kind)
    return list(_sites(axes)), list(dict.fromkeys(reason for _, reason in axes.fixed))


def _sites(axes: Axes, values: Sequence[fx.Node] = ()) -> Iterator[Site]:
    classes, exponents = axes.classes()
    cells, groups = _signatures(axes, classes)
    holders = _holders(axes, classes)
    labels = {node.name: axes.env.get(node) for node in values}
    seen = {name: _Holder.of(classes, value) for name, value in labels.items() if isinstance(value, Tensor)}
    found: dict[int, dict[int, list[int]]] = {}
    first = _first_labels(classes, (classes > 0) & (groups != 0))  # in the order of the graph
    for group, cell, kind in zip(*(part[first].tolist() for part in (groups, cells, classes)), strict=True):
        found.setdefault(group, {}).setdefault(cell, []).append(kind)
    for blocks in found.values():
        for size in sorted({len(cell) for cell in blocks.values()}):
            if size > 1 or axes.kind.is_factor:
                same = torch.tensor([cell for cell in blocks.values() if len(cell) == size])
                yield _site(axes.kind, same, holders, exponents, seen)


def _first_labels(classes: Tensor, wanted: Tensor) -> Tensor:
    """The first label of each class among those wanted, ascending."""
    labels = torch.nonzero(wanted).flatten()
    first = torch.full((int(classes.max()) + 1,), len(classes))
    first.scatter_reduce_(0, classes[labels], labels, "amin")
    return first[first < len(classes)].sort().values


class _Holder(NamedTuple):
    """Where labels are, by class: `places[i]` is of class `ordered[i]`."""

    places: Tensor
    ordered: Tensor
    known: frozenset[int]

    @classmethod
    def of(cls, classes: Tensor, labels: Tensor) -> "_Holder":
        ordered, places = torch.sort(classes[labels.clamp(min=0).flatten()], stable=True)
        return cls(places, ordered, frozenset(ordered.tolist()))

    def find(self, blocks: Tensor) -> Tensor | None:
        """Places [blocks, copies, channels] of the classes [blocks, channels]; None if they are not all here."""
        sample = int(blocks[0, 0])
        if sample not in self.known:
            return None
        first = torch.searchsorted(self.ordered, blocks)
        copies = int((self.ordered == sample).sum())
        places = (first[:, None] + torch.arange(copies)[None, :, None]).clamp(max=len(self.ordered) - 1)
        whole = torch.equal(self.ordered[places], blocks[:, None].expand_as(places))
        return self.places[places] if whole else None


def _holders(axes: Axes, classes: Tensor) -> list[tuple[Use, _Holder]]:
    uses = {use.key: use for use in reversed(axes.uses)}.values()  # a tied tensor is rewritten once
    return [(use, _Holder.of(classes, use.labels)) for use in uses][::-1]


def _site(
    kind: Kind,
    blocks: Tensor,
    holders: Sequence[tuple[Use, _Holder]],
    exponents: Tensor,
    seen: Mapping[str, _Holder],
) -> Site:
    """Where each stored tensor holds the channels, given by class: int64 [blocks, channels]."""
    uses, positions, signs = [], [], []
    for use, holder in holders:
        found = holder.find(blocks)  # of one site are the classes that the same tensors hold
        if found is not None:
            uses.append(use)
            positions.append(found)
            signs.append(exponents[use.labels.flatten()][found])
    values = {name: found for name, holder in seen.items() if (found := holder.find(blocks)) is not None}
    return Site(kind, tuple(uses), tuple(positions), tuple(signs), values)


def _signatures(axes: Axes, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers for each label: equal cells may trade places, equal groups are of one site.

    A cell's channels lie in the same blocks and are held, equally often, by the same tensors; a site's by the same
    tensors. Each block and each use has a random number; sums of them tell sets apart.
    """
    random = torch.Generator().manual_seed(0)
    count = int(classes.max()) + 1

    def number() -> Tensor:
        return torch.randint(-(2**62), 2**62, (1,), generator=random)

    held, kept = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    for use in {use.key: use for use in axes.uses}.values():
        here = classes[use.labels.flatten()]
        held.index_add_(0, here, number().expand(len(here)))
    for block in axes.blocks:
        for row in block:
            inside = classes[row.clamp(min=0)].unique()
            kept.index_add_(0, inside, number().expand(len(inside)))
    return (held * 3 + kept)[classes], held[classes]
