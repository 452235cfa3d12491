"""Reading attention masks: which keys a query sees, from the graph that computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import No
from qcompiler.program import Program
from qcompiler.rewrite import arguments, op_name, type_of_node

aten = torch.ops.aten

_LOW = -1e4  # what is added to the score of a key that must not be seen is below this


@dataclass(frozen=True)
class Sight:
    """What a query sees: keys at `-left .. right` of it (-1: no limit), in its own chunk (0: none), where the token is
    real (`padding` [batch, keys], nonzero there)."""

    padding: fx.Node | None = None
    left: int = -1
    right: int = -1
    chunk: int = 0

    def both(self, other: "Sight") -> "Sight | No":
        """What is seen by both."""
        if self.chunk and other.chunk and self.chunk != other.chunk:
            return No(f"chunks of {self.chunk} and of {other.chunk}")
        if self.padding and other.padding and self.padding is not other.padding:
            return No("two different padding masks")
        left, right = _nearer(self.left, other.left), _nearer(self.right, other.right)
        return Sight(self.padding or other.padding, left, right, self.chunk or other.chunk)


def _nearer(a: int, b: int) -> int:
    return min((side for side in (a, b) if side >= 0), default=-1)


def read(program: Program, node: fx.Node) -> Sight | No:
    """The sight that a mask [batch or 1, 1, queries, keys] means: a boolean one is true where a key may be seen, any
    other is added to the scores."""
    reader = _stored if node.op == "get_attr" else _READERS.get(op_name(node))
    if reader is None or type_of_node(node) is None:
        return No(f"the mask is made by {op_name(node) or node.op}")
    return reader(program, node, arguments(node))


def read_for(program: Program, mask: fx.Node, q: fx.Node, k: fx.Node) -> Sight | No:
    """The sight that a mask means for queries and keys [batch, heads, sequence, d]."""
    kind, queries, keys = type_of_node(mask), q.meta["type"].shape[2], k.meta["type"].shape[2]
    if kind is None or kind.shape[-2:] not in ((queries, keys), (1, keys)):
        return No(f"it is {kind}, not [batch, 1, {queries}, {keys}]")
    return read(program, mask)


def _qc_mask(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    padding = args["padding"]
    return Sight(None if padding is None else real_tokens(padding), args["left"], args["right"], args["chunk"])


def _and(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    left, right = read(program, args["self"]), read(program, args["other"])
    if isinstance(left, No) or isinstance(right, No):
        return left if isinstance(left, No) else right
    return left.both(right)


def _through(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """A mask repeated over the batch, or in another precision."""
    kind, source = type_of_node(node), type_of_node(args["self"])
    if kind is None or source is None or kind.shape[-1] != source.shape[-1]:
        return No("the mask is cut or repeated")
    if source.shape[-2] not in (1, kind.shape[-2]):
        return No("the mask is cut or repeated")
    if kind.dtype != source.dtype and not (kind.dtype.is_floating_point and source.dtype.is_floating_point):
        return No(f"the mask is a {kind} made of a {source}")
    return read(program, args["self"])


def _everything(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """A boolean mask of ones."""
    kind = type_of_node(node)
    return Sight() if kind is not None and kind.dtype == torch.bool else No(f"the mask is full of ones ({kind})")


def _not(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """What is not hidden: keys that do not come after the query, or to whose scores nothing is added."""
    hidden = args["self"]
    if op_name(hidden) in _OPPOSITE:
        return _compared(_OPPOSITE[op_name(hidden)], *hidden.args[:2])
    source = real_tokens(hidden)
    kind = type_of_node(source)
    if source is not hidden and kind is not None and kind.dtype.is_floating_point:
        return read(program, source)
    return No(f"the mask is the opposite of {op_name(hidden) or hidden.op}")


def _stored(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """The first queries and keys of a stored triangle (GPT-Neo)."""
    source: Any = node
    while op_name(source) == "slice":
        found = arguments(source)
        if found["start"] != 0 or found["step"] != 1:
            return No("a part of a stored mask that does not begin with its first query and key")
        source = found["self"]
    table = program.tensor_of(source)
    if table is None or table.dim() < 2 or table.numel() != table.shape[-1] ** 2:
        return No("the mask is no stored square, nor part of one")
    table = table.reshape(table.shape[-2:])
    if table.dtype == torch.bool:
        return _band(table)
    return _band(table == 0) if bool(((table == 0) | (table <= _LOW)).all()) else No("the stored mask is a bias")


def _band(table: Tensor) -> Sight | No:
    """The window [queries, keys] that is true where -left <= key - query <= right."""
    size = table.shape[0]
    place = torch.arange(size)
    distance = place[None, :] - place[:, None]
    seen = distance[table]
    if table.shape != (size, size) or not seen.numel():
        return No("the stored mask is no window")
    low, high = int(seen.min()), int(seen.max())
    if low > 0 or high < 0 or not torch.equal(table, (distance >= low) & (distance <= high)):
        return No("the stored mask is no window")
    return Sight(left=-1 if low == 1 - size else -low, right=-1 if high == size - 1 else high)


def _where(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """where(seen, 0, -inf)"""
    if constant(program, args["self"]) != 0 or not is_low(program, args["other"]):
        return No("where() does not choose between 0 and a large negative number")
    return read(program, args["condition"])


def _compare(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """keys <= queries: causal. keys > queries - n: a window of n."""
    return _compared(op_name(node), args["self"], args["other"])


_OPPOSITE = {"le": "gt", "gt": "le", "ge": "lt", "lt": "ge"}
_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}


def _compared(name: str, left: Any, right: Any) -> Sight | No:
    a, b = _place(left), _place(right)
    if a is None or b is None:
        return No("a comparison of something else than positions")
    if (a.axis, b.axis) == ("query", "key"):
        name, a, b = _MIRRORED[name], b, a
    if (a.axis, b.axis) != ("key", "query"):
        return No("a comparison of something else than positions of keys and queries")
    distance = b.offset - a.offset  # key <= query + distance
    if name in ("le", "lt"):
        far = distance - (name == "lt")
        return Sight(right=far) if far >= 0 else No("queries do not see themselves")
    far = -distance - (name == "gt")
    return Sight(left=far) if far >= 0 else No("queries do not see themselves")


def _gathered(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """padding[batch index, key index]"""
    rows = args["indices"]
    if len(rows) != 2 or None in rows:
        return No("the mask is gathered by something else than batch and key")
    batch, key = (_place(row) for row in rows)
    if batch is None or key is None or (batch.axis, key.axis) != ("batch", "key") or batch.offset or key.offset:
        return No("the mask is gathered by something else than batch and key")
    return Sight(real_tokens(args["self"]))


def _broadcast(program: Program, node: fx.Node, args: dict[str, Any]) -> Sight | No:
    """padding[:, None, None, :]; window[None, None]"""
    source: Any = node
    while op_name(source) == "unsqueeze":
        source = source.args[0]
    kind, inner = type_of_node(node), type_of_node(source)
    if kind is None or inner is None or kind.dtype != torch.bool:
        return No(f"the mask is {kind}")
    if inner.rank == 2 and kind.rank == 4 and kind.shape[1:3] == (1, 1):
        return Sight(real_tokens(source))
    if kind.shape[-inner.rank :] == inner.shape:
        return read(program, source)
    return No(f"the mask is a {kind} made of a {inner}")


@dataclass(frozen=True)
class _Positions:
    axis: str
    offset: int


def _place(node: Any) -> _Positions | None:
    """Along which axis of [batch, 1, queries, keys] a node counts 0, 1, 2 …, and from which number on; the first two
    axes may be missing."""
    kind = type_of_node(node)
    source, offset = node, 0
    while op_name(source) in ("unsqueeze", "_to_copy", "reshape", "add", "sub"):
        args = arguments(source)
        if op_name(source) in ("add", "sub"):
            if not isinstance(args["other"], int) or args["alpha"] != 1:
                return None
            offset += args["other"] * (1 if op_name(source) == "add" else -1)
        source = args["self"]
    counted = type_of_node(source)
    if kind is None or kind.rank > 4 or op_name(source) != "arange" or counted is None or not _from_zero(source):
        return None
    axes = [i - kind.rank for i, size in enumerate(kind.shape) if size != 1]
    return _Positions(("batch", "head", "query", "key")[axes[0]], offset) if len(axes) == 1 else None


def _from_zero(node: fx.Node) -> bool:
    args = arguments(node)
    return bool(args.get("start", 0) == 0 and args.get("step", 1) == 1)


def real_tokens(padding: fx.Node) -> fx.Node:
    """The mask [batch, keys] before it became boolean: what is nonzero stays nonzero."""
    while op_name(padding) == "_to_copy" and padding.meta["type"].dtype == torch.bool:
        padding = padding.all_input_nodes[0]
    if op_name(padding) == "ne" and padding.args[1] == 0:
        padding = padding.all_input_nodes[0]
    return padding


def constant(program: Program, value: Any) -> float | None:
    """A number, or the one value of a tensor that is full of it."""
    if isinstance(value, (int, float)):
        return value
    stored = program.tensor_of(value)
    if stored is not None and stored.numel() == 1 and stored.dtype != torch.bool:
        return float(stored.item())
    name = op_name(value)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0
    if name in ("full", "full_like", "new_full"):
        return constant(program, arguments(value)["fill_value"])
    return None


def is_low(program: Program, value: Any) -> bool:
    """Whether a value is one negative number so large that a score with it added is nothing."""
    number = constant(program, value)
    return number is not None and number <= _LOW


_READERS: dict[str, Callable[[Program, fx.Node, dict[str, Any]], Sight | No]] = {
    "qc.mask": _qc_mask,
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _and),
    **dict.fromkeys(("expand", "_to_copy", "repeat"), _through),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _everything),
    **dict.fromkeys(("logical_not", "bitwise_not"), _not),
    "slice": _stored,
    **dict.fromkeys(("le", "lt", "ge", "gt"), _compare),
    "where": _where,
    "index": _gathered,
    "unsqueeze": _broadcast,
}
