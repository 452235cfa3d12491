"""Rotary position embedding in the spellings of transformers, to qc.rope. Source: RoFormer (arXiv 2104.09864).

A rule finds x and the tables it is multiplied by. Models mostly write each angle twice, once for either channel of
a pair; `Tables` proves that and finds the table before it was doubled.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.program import Program, Type
from qcompiler.rewrite import Capture, Pattern, Rule, arguments, op, op_name, type_of_node

aten = torch.ops.aten

_UNARY = {"cos", "sin", "neg", "_to_copy", "exp", "reciprocal"}
_BINARY = {"mul", "add", "sub", "div"}
_LEADING = {"unsqueeze", "squeeze", "expand", "select", "slice", "index_select", "transpose"}


class Tables:
    """Finds the tables of cosines and sines before they were doubled; remembers them, as all layers share them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[tuple[fx.Node, bool], fx.Node | No] = {}

    def single(self, node: fx.Node, interleaved: bool) -> fx.Node | No:
        """The value [..., r/2] that `node` [..., r] holds twice: side by side, or each entry two times in a row."""
        if (node, interleaved) not in self._known:
            with self.program.graph.inserting_before(node):
                self._known[node, interleaved] = self._single(node, interleaved)
        return self._known[node, interleaved]

    def _single(self, node: fx.Node, interleaved: bool) -> fx.Node | No:
        name = op_name(node)
        if name in _UNARY:
            return self._rebuilt(node, {0: self._argument(node.args[0], interleaved)})
        if name in _BINARY:
            return self._rebuilt(node, {i: self._argument(node.args[i], interleaved) for i in (0, 1)})
        if node.op == "get_attr":
            return self._stored(node, interleaved)
        if name in _LEADING and self._leaves_channels(node):
            return self._rebuilt(node, {0: self._argument(node.args[0], interleaved)})
        if name in ("index", "embedding"):
            return self._rebuilt(node, {0: self._argument(node.args[0], interleaved)})
        found = _doubled(node, interleaved)
        if found is None:
            return No(f"its tables are not seen to hold each angle twice (at {node.name})")
        return self._shortened(found)

    def _argument(self, value: Any, interleaved: bool) -> Any:
        """The single form of an argument; what has one channel or none serves both as it is."""
        kind = type_of_node(value)
        if kind is None or kind.rank == 0 or kind.shape[-1] == 1:
            return value
        return self.single(value, interleaved)

    def _rebuilt(self, node: fx.Node, changed: dict[int, Any]) -> fx.Node | No:
        args = list(node.args)
        for i, value in changed.items():
            if isinstance(value, No):
                return value
            args[i] = value
        if all(new is old for new, old in zip(args, node.args, strict=True)):
            return No(f"its tables are not seen to hold each angle twice (at {node.name})")
        return self.program.call(node.target, args, node.kwargs, like=node, type=_halved(node))

    def _leaves_channels(self, node: fx.Node) -> bool:
        kind, found = type_of_node(node), arguments(node)
        if op_name(node) == "expand":
            return kind is not None and kind.rank == len(found["size"]) and found["size"][-1] == -1
        used = {found[name] for name in ("dim", "dim0", "dim1") if name in found}
        return -1 not in used

    def _stored(self, node: fx.Node, interleaved: bool) -> fx.Node | No:
        """A stored table, compared with itself."""
        table, name = self.program.tensors[str(node.target)], f"{node.target}_single"
        width = table.shape[-1]
        one, other = (
            (table[..., 0::2], table[..., 1::2])
            if interleaved
            else (table[..., : width // 2], table[..., width // 2 :])
        )
        if one.shape != other.shape or not torch.equal(one, other):
            return No(f'the stored table "{node.target}" does not hold each angle twice')
        self.program.tensors[name] = one.contiguous()
        return self.program.get(name, node)

    def _shortened(self, node: fx.Node) -> fx.Node:
        """A table that takes the first half of a doubled one (GLM) is that one before it was doubled."""
        if op_name(node) != "slice":
            return node
        found, whole = arguments(node), type_of_node(node.args[0])
        if whole is None or (found["dim"], found["start"], found["step"]) != (-1, 0, 1):
            return node
        if found["end"] != _half(whole.shape[-1]):
            return node
        whole_single = self.single(found["self"], False)
        return node if isinstance(whole_single, No) else whole_single


def _half(size: Any) -> int:
    return size // 2 if isinstance(size, int) else -1


def _halved(node: fx.Node) -> Type:
    kind = node.meta["type"]
    return Type((*kind.shape[:-1], kind.shape[-1] // 2), kind.dtype)


def _doubled(node: fx.Node, interleaved: bool) -> fx.Node | None:
    """What is written twice by cat([f, f], -1), repeat_interleave(f, 2, -1), or stack([f, f], -1) flattened."""
    name, found = op_name(node), arguments(node)
    value: Any = None
    if not interleaved:
        if name == "cat" and found["dim"] == -1 and len(found["tensors"]) == 2:
            value, other = found["tensors"]
            value = value if value is other else None
        elif name == "repeat" and list(found["repeats"])[-1] == 2 and set(found["repeats"][:-1]) <= {1}:
            value = found["self"]
    elif name == "repeat_interleave" and found.get("dim") == -1 and found.get("repeats") == 2:
        value = found["self"]
    elif name in ("flatten", "reshape") and op_name(node.args[0]) == "stack":
        pair = arguments(node.args[0])  # type: ignore[arg-type]
        if pair["dim"] == -1 and len(pair["tensors"]) == 2 and pair["tensors"][0] is pair["tensors"][1]:
            value = pair["tensors"][0]
    kind, whole = type_of_node(value), type_of_node(node)
    if kind is None or whole is None or kind.rank != whole.rank or kind.shape[-1] != _half(whole.shape[-1]):
        return None
    return value  # type: ignore[no-any-return]


# -- putting qc.rope in place ----------------------------------------------------------------------------------


def _rope(program: Program, node: fx.Node, x: Any, cos: Any, sin: Any, interleaved: bool) -> fx.Node | No:
    """qc.rope of x [batch, heads, sequence, d] or [batch, sequence, heads, d]; tables [.., r/2] serve all heads."""
    kind = type_of_node(x)
    if kind is None or kind.rank != 4 or kind != type_of_node(node):
        return No(f"x is {kind}, not [batch, heads, sequence, d]")
    heads = _heads_axis(kind, type_of_node(cos))
    if isinstance(heads, No):
        return heads
    cos, sin = (_without_heads(program, table, heads, node) for table in (cos, sin))
    return _placed(program, node, x, cos, sin, heads, interleaved)


def _placed(program: Program, node: fx.Node, x: Any, cos: Any, sin: Any, heads: int, interleaved: bool) -> fx.Node:
    """qc.rope in the place of `node`; heads stand at axis `heads` of x, tables are [batch or 1, sequence, r/2]."""
    how = {"interleaved": True} if interleaved else {}
    if heads == 1:
        return program.call(qc.rope, (x, cos, sin), how, like=node)
    kind = node.meta["type"]
    b, s, h, d = kind.shape
    turned = Type((b, h, s, d), kind.dtype)
    x = program.call(aten.transpose.int, (x, 1, 2), like=node, type=turned)
    x = program.call(qc.rope, (x, cos, sin), how, like=node, type=turned)
    return program.call(aten.transpose.int, (x, 1, 2), like=node)


def _heads_axis(x: Type, table: Type | None) -> int | No:
    """The axis of x that the tables are the same along."""
    if table is None or table.rank not in (2, 3, 4) or not _narrow(table.shape[-1], x.shape[-1]):
        return No(f"tables of {table} do not fit x of {x}")
    shape = (1,) * (4 - table.rank) + table.shape
    for heads, sequence in ((1, 2), (2, 1)):
        if shape[heads] == 1 and shape[sequence] == x.shape[sequence] and shape[0] in (1, x.shape[0]):
            return heads
    return No(f"tables of {table} are not the same for all heads of {x}")


def _narrow(angles: Any, channels: Any) -> bool:
    """Whether so many angles turn no more than the channels there are."""
    return isinstance(angles, int) and isinstance(channels, int) and 2 * angles <= channels


def _without_heads(program: Program, table: fx.Node, heads: int, like: fx.Node) -> fx.Node:
    """The table as [batch or 1, sequence, r/2]."""
    kind = table.meta["type"]
    if kind.rank == 2:
        return program.call(aten.unsqueeze.default, (table, 0), like=like, type=Type((1, *kind.shape), kind.dtype))
    if kind.rank == 3 and heads == 1:
        return table
    if kind.rank == 3:  # [sequence, 1, r/2]
        turned = Type((1, kind.shape[0], kind.shape[2]), kind.dtype)
        return program.call(aten.transpose.int, (table, 0, 1), like=like, type=turned)
    if op_name(table) == "unsqueeze" and arguments(table)["dim"] == heads - 4:
        return table.all_input_nodes[0]
    flat = Type(tuple(size for axis, size in enumerate(kind.shape) if axis != heads), kind.dtype)
    return program.call(aten.squeeze.dim, (table, heads), like=like, type=flat)


# -- spellings -------------------------------------------------------------------------------------------------


def halves(x: Pattern, half: Pattern, width: Pattern) -> tuple[Pattern, Pattern]:
    """The first and the second half of the channels of x."""
    pair = op.split_with_sizes(x, [half, half], -1)
    first = op.slice(x, -1, 0, half, 1) | op.getitem(pair, 0)
    second = op.slice(x, -1, half, width, 1) | op.getitem(pair, 1)
    return first, second


def pairs(x: Pattern) -> tuple[Pattern, Pattern]:
    """The even and the odd channels of x."""
    width = Capture("width")
    return op.slice(x, -1, 0, width, 2), op.slice(x, -1, 1, width, 2)


def woven(a: Pattern, b: Pattern) -> Pattern:
    """a and b, channel by channel in turn."""
    stacked = op.stack([a, b], -1)
    return op.flatten(stacked, -2) | op.reshape(stacked, Capture("shape"))


@dataclass(frozen=True)
class RotateHalf(Rule):
    """x * cos + cat([-x2, x1], -1) * sin with x1, x2 the halves of x  ->  qc.rope(x, cos', sin')"""

    near = 5
    tables: Tables

    def pattern(self, x: Pattern, cos: Pattern, sin: Pattern, half: Pattern, width: Pattern) -> Pattern:
        first, second = halves(x, half, width)
        return x * cos + op.cat([-second, first], -1) * sin

    def rewrite(
        self, program: Program, node: fx.Node, x: Any, cos: Any, sin: Any, half: Any, width: Any
    ) -> fx.Node | No:
        if not _in_the_middle(x, half, width):
            return No("x is not split in the middle")
        return _rope_of_doubled(program, node, x, (cos, sin), self.tables, interleaved=False)


@dataclass(frozen=True)
class RotatePairs(Rule):
    """x * cos + weave(-odd(x), even(x)) * sin  ->  qc.rope(x, cos', sin', interleaved=True)"""

    near = 5
    tables: Tables

    def pattern(self, x: Pattern, cos: Pattern, sin: Pattern) -> Pattern:
        even, odd = pairs(x)
        return x * cos + woven(-odd, even) * sin

    def rewrite(self, program: Program, node: fx.Node, x: Any, cos: Any, sin: Any) -> fx.Node | No:
        return _rope_of_doubled(program, node, x, (cos, sin), self.tables, interleaved=True)


class HalvesApart(Rule):
    """cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)  ->  qc.rope(x, cos, sin)"""

    near = 6

    def pattern(self, x: Pattern, cos: Pattern, sin: Pattern, half: Pattern, width: Pattern) -> Pattern:
        first, second = halves(x, half, width)
        return op.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def rewrite(
        self, program: Program, node: fx.Node, x: Any, cos: Any, sin: Any, half: Any, width: Any
    ) -> fx.Node | No:
        if not _in_the_middle(x, half, width):
            return No("x is not split in the middle")
        return _rope(program, node, x, cos, sin, interleaved=False)


class PairsApart(Rule):
    """weave(even(x) * cos - odd(x) * sin, odd(x) * cos + even(x) * sin)  ->  qc.rope(x, cos, sin, interleaved=True)"""

    near = 7

    def pattern(self, x: Pattern, cos: Pattern, sin: Pattern) -> Pattern:
        even, odd = pairs(x)
        return woven(even * cos - odd * sin, odd * cos + even * sin)

    def rewrite(self, program: Program, node: fx.Node, x: Any, cos: Any, sin: Any) -> fx.Node | No:
        return _rope(program, node, x, cos, sin, interleaved=True)


class PairsToHalves(Rule):
    """cat([even(x) * cos - odd(x) * sin, odd(x) * cos + even(x) * sin], -1)  ->  qc.rope(cat([even(x), odd(x)], -1))"""

    near = 6

    def pattern(self, x: Pattern, cos: Pattern, sin: Pattern) -> Pattern:
        even, odd = pairs(x)
        return op.cat([even * cos - odd * sin, odd * cos + even * sin], -1)

    def rewrite(self, program: Program, node: fx.Node, x: Any, cos: Any, sin: Any) -> fx.Node | No:
        kind = node.meta["type"]
        half = Type((*kind.shape[:-1], kind.shape[-1] // 2), kind.dtype)
        even, odd = (
            program.call(aten.slice.Tensor, (x, kind.rank - 1, start, 2**63 - 1, 2), like=node, type=half)
            for start in (0, 1)
        )
        sorted_pairs = program.call(aten.cat.default, ([even, odd], -1), like=node)
        return _rope(program, node, sorted_pairs, cos, sin, interleaved=False)


class ComplexPairs(Rule):
    """view_as_real(view_as_complex(pairs of x) * polar(1, angle))  ->  qc.rope(x, cos, sin, interleaved=True)"""

    near = 4

    def pattern(self, x: Pattern, sizes: Pattern, turn: Pattern) -> Pattern:
        turned = op.view_as_real(op.view_as_complex(op.reshape(x, sizes)) * turn)
        return op.reshape(turned, Capture("shape")) | op.flatten(turned, -2)

    def rewrite(self, program: Program, node: fx.Node, x: Any, sizes: Any, turn: Any) -> fx.Node | No:
        kind = type_of_node(node)
        if kind is None or kind.rank != 4 or len(sizes) != 5 or sizes[-1] != 2:
            return No(f"it makes {kind} of pairs {sizes}")
        with program.graph.inserting_before(turn):
            tables = _cartesian(program, turn)
        if isinstance(tables, No):
            return tables
        whole = program.call(aten.reshape.default, (x, [*sizes[:3], kind.shape[3]]), like=node)
        return _rope(program, node, whole, *tables, interleaved=True)


class PartialRope(Rule):
    """cat([qc.rope(x[..., :r], cos, sin), x[..., r:]], -1)  ->  qc.rope(x, cos, sin)"""

    def pattern(self, x: Pattern, cos: Pattern, sin: Pattern, flag: Pattern, axis: Pattern) -> Pattern:
        size, end = Capture("size"), Capture("end")
        split = op.split_with_sizes(x, [size, Capture("rest")], -1)
        part = op.slice(x, -1, 0, size, 1) | op.getitem(split, 0)
        rest = op.slice(x, -1, size, end, 1) | op.getitem(split, 1)
        turned = op.qc.rope(op.transpose(part, axis, -2), cos, sin, interleaved=flag)
        rope = op.qc.rope(part, cos, sin, interleaved=flag) | op.transpose(turned, -3, -2)
        return op.cat([rope, rest], -1)

    def rewrite(
        self, program: Program, node: fx.Node, x: Any, cos: Any, sin: Any, flag: Any, axis: Any
    ) -> fx.Node | No | None:
        if axis not in (None, -3):
            return None
        if type_of_node(x) is None or type_of_node(x) != type_of_node(node):
            return No("the parts of x are not put together again")
        return _placed(program, node, x, cos, sin, 1 if axis is None else 2, bool(flag))


def rules(program: Program) -> tuple[Rule, ...]:
    """The rotary rules, sharing what they find out about the tables of `program`."""
    tables = Tables(program)
    doubled = (RotateHalf(tables), RotatePairs(tables))
    return (*doubled, HalvesApart(), PairsApart(), PairsToHalves(), ComplexPairs(), PartialRope())


def _in_the_middle(x: Any, half: Any, width: Any) -> bool:
    kind = type_of_node(x)
    size = kind.shape[-1] if kind is not None else None
    return isinstance(half, int) and 2 * half == size and width in (None, size)


def _rope_of_doubled(
    program: Program, node: fx.Node, x: Any, doubled: tuple[Any, Any], tables: Tables, interleaved: bool
) -> fx.Node | No:
    found = []
    for table in doubled:
        kind = type_of_node(table)
        single = tables.single(table, interleaved) if kind and kind.rank else No(f"a table is {kind}")
        if isinstance(single, No):
            return single
        found.append(single)
    return _rope(program, node, x, found[0], found[1], interleaved)


def _cartesian(program: Program, turn: fx.Node) -> tuple[fx.Node, fx.Node] | No:
    """Cosine and sine tables of a complex table: polar(1, a) * s is (s cos a, s sin a)."""
    kind, name = turn.meta["type"], op_name(turn)
    real = Type(kind.shape, torch.float32)
    if name == "polar":
        size, angle = turn.args
        parts = [program.call(f, (angle,), like=turn, type=real) for f in (aten.cos.default, aten.sin.default)]
        if op_name(size) in ("ones_like", "ones"):
            return parts[0], parts[1]
        cos, sin = (program.call(aten.mul.Tensor, (part, size), like=turn, type=real) for part in parts)
        return cos, sin
    source = turn.args[0] if turn.args else None
    numbers = all(not isinstance(a, fx.Node) for a in turn.args[1:])
    if name not in ("unsqueeze", "mul", "slice", "index_select") or not numbers or not isinstance(source, fx.Node):
        return No(f"its complex table is not made by polar (at {turn.name})")
    inner = _cartesian(program, source)
    if isinstance(inner, No):
        return inner
    cos, sin = (program.call(turn.target, (part, *turn.args[1:]), like=turn, type=real) for part in inner)
    return cos, sin
