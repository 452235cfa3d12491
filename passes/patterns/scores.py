"""Reading attention scores: q and k, scale, soft cap, and what is added before the softmax."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.passes.patterns import masks
from qcompiler.program import Program, Type
from qcompiler.rewrite import Capture, arguments, matches, op, op_name, type_of_node

aten = torch.ops.aten


@dataclass(frozen=True)
class Scores:
    """softcap(q @ k' * scale) + added, with q, k [batch, heads, sequence, d]; masks among `added` may be boolean."""

    q: fx.Node
    k: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    added: tuple[fx.Node, ...] = ()


def read_scores(program: Program, node: Any) -> Scores | No:
    """The scores [batch, heads, queries, keys] that a node computes."""
    reader = _READERS.get(op_name(node))
    return reader(program, node) if reader else No(f"its scores are made by {op_name(node) or node}")


def hides(program: Program, added: fx.Node) -> bool:
    """Whether what is added to the scores hides some of them and leaves the others as they are."""
    kind = type_of_node(added)
    return (kind is not None and kind.dtype == torch.bool) or not isinstance(masks.read(program, added), No)


def _product(program: Program, node: fx.Node) -> Scores | No:
    """q @ k'"""
    found = matches(op.matmul(Capture("q"), op.transpose(Capture("k"), -2, -1)), node)
    return Scores(found["q"], found["k"]) if found else No("its scores are no product of q and k")


def _flat_product(program: Program, node: fx.Node) -> Scores | No:
    """baddbmm(bias, q, k', alpha=scale) over batch and heads in one dimension (BLOOM)"""
    bias, q, k, scale = map(Capture, ("bias", "q", "k", "scale"))
    flat_q, flat_k = op.reshape(q, Capture("to")), op.reshape(k, Capture("too"))
    product = op.baddbmm(bias, flat_q, op.transpose(flat_k, -2, -1), beta=Capture("beta"), alpha=scale)
    found = matches(op.reshape(product, Capture("back")), node)
    queries, kind = type_of_node(found["q"]) if found else None, type_of_node(node)
    if found is None or queries is None or kind is None or queries.shape[:3] != kind.shape[:3] or found["beta"] != 1:
        return No("its scores are no product of q and k")
    offset = type_of_node(found["bias"])
    if offset is None or offset.rank != 3:
        return No(f"a bias of {offset} is added to its scores")
    shape = Type((*kind.shape[:2], *offset.shape[1:]), offset.dtype)
    wide = program.call(aten.unflatten.int, (found["bias"], 0, [-1, kind.shape[1]]), like=node, type=shape)
    return Scores(found["q"], found["k"], float(found["scale"]), added=(wide,))


def _sum(program: Program, node: fx.Node) -> Scores | No:
    """scores + mask, mask + scores"""
    args = arguments(node)
    left, right = args["self"], args["other"]
    if args["alpha"] != 1 or type_of_node(left) is None or type_of_node(right) is None:
        return No("a number is added to its scores")
    for scores, added in ((left, right), (right, left)):
        found = read_scores(program, scores)
        if not isinstance(found, No):
            return replace(found, added=(*found.added, added))
    return read_scores(program, left)


def _scaled(program: Program, node: fx.Node) -> Scores | No:
    """scores * c, scores / c; tanh(scores / c) * c is a soft cap"""
    args = arguments(node)
    number = masks.constant(program, args["other"])
    if not number:
        return No("its scale is computed")
    if op_name(node) == "mul" and op_name(args["self"]) == "tanh":
        return _capped(program, args["self"].all_input_nodes[0], number)
    found = read_scores(program, args["self"])
    if isinstance(found, No):
        return found
    if found.softcap or number < 0 or not all(hides(program, added) for added in found.added):
        return No("its scores are scaled after something was added")
    factor = number if op_name(node) == "mul" else 1 / number
    return replace(found, scale=found.scale * factor)


def _capped(program: Program, node: fx.Node, cap: float) -> Scores | No:
    found = read_scores(program, node)
    if isinstance(found, No):
        return found
    if found.softcap or found.added:
        return No("its scores are capped after something was added")
    return replace(found, scale=found.scale * cap, softcap=cap)


def _filled(program: Program, node: fx.Node) -> Scores | No:
    """where(seen, scores, low), scores.masked_fill(hidden, low)"""
    args = arguments(node)
    by_where = op_name(node) == "where"
    low = args["other"] if by_where else args["value"]
    if not masks.is_low(program, low):
        return No(f"hidden scores become {low}, which is no large negative number")
    found = read_scores(program, args["self"])
    if isinstance(found, No):
        return found
    mask = args["condition"] if by_where else args["mask"]
    seen = mask if by_where else program.call(aten.logical_not.default, (mask,), like=node, type=type_of_node(mask))
    return replace(found, added=(*found.added, seen))


_READERS: dict[str, Callable[[Program, fx.Node], Scores | No]] = {
    "matmul": _product,
    "reshape": _flat_product,
    "add": _sum,
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("where", "masked_fill"), _filled),
}
