"""Attention in other spellings, to qc.attention; masks and repeated keys folded into it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.ops import default_scale, qc
from qcompiler.passes.patterns import masks
from qcompiler.passes.patterns.scores import hides, read_scores
from qcompiler.program import Program, Type
from qcompiler.rewrite import Capture, Pattern, Rule, arguments, matches, op, type_of_node

aten = torch.ops.aten


class ScaledDotProduct(Rule):
    """scaled_dot_product_attention(q, k, v, mask, is_causal=)  ->  qc.attention(q, k, v, mask, right=0)"""

    def pattern(self, q: Pattern, k: Pattern, v: Pattern, mask: Pattern, causal: Pattern, scale: Pattern) -> Pattern:
        grouped = Capture("grouped")
        return op.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)

    def rewrite(
        self, program: Program, node: fx.Node, q: Any, k: Any, v: Any, mask: Any, causal: Any, scale: Any
    ) -> fx.Node | No:
        answer = _fits(q, k, v)
        if isinstance(answer, No):
            return answer
        if causal and q.meta["type"].shape[2] != k.meta["type"].shape[2]:
            return No("it is causal, counted from the first key, over more keys than queries")
        how = {"scale": default_scale(answer) if scale is None else float(scale)} | ({"right": 0} if causal else {})
        return program.call(qc.attention, trimmed([q, k, v, mask]), how, like=node)


class EagerAttention(Rule):
    """softmax(q @ k' * scale + mask, -1) @ v  ->  qc.attention(q, k, v, mask, scale=); see scores.py for what else"""

    def pattern(self, scores: Pattern, v: Pattern) -> Pattern:
        weights = op.softmax(scores, -1) | op.softmax(scores, -1, Capture("dtype"))
        flat = op.bmm(op.reshape(weights, Capture("to")), op.reshape(v, Capture("too")))
        return op.matmul(weights, v) | op.reshape(flat, Capture("back"))

    def rewrite(self, program: Program, node: fx.Node, scores: Any, v: Any) -> fx.Node | No | None:
        kind = type_of_node(node)
        if kind is None or kind.rank != 4:
            return None
        if kind.dtype.itemsize < 4:
            return No(f"{kind.dtype} is rounded after each step here, and once in the attention operator")
        found = read_scores(program, scores)
        if isinstance(found, No):
            return found
        answer = _fits(found.q, found.k, v)
        if isinstance(answer, No):
            return answer
        sight = masks.Sight()
        masked: list[fx.Node] = []
        biases: list[fx.Node] = []
        for added in found.added:
            read = masks.read_for(program, added, found.q, found.k)
            both = read if isinstance(read, No) else sight.both(read)
            if not isinstance(both, No):
                sight = both
            else:
                (masked if hides(program, added) else biases).append(added)
        if len(masked) > 1 or len(biases) > 1:
            return No("several masks or several biases are added to its scores")
        mask, bias = next(iter(masked), None), next(iter(biases), None)
        how = {"scale": found.scale, "softcap": found.softcap}
        return program.call(
            qc.attention, trimmed([found.q, found.k, v, mask, sight.padding, bias]), options(sight, how), like=node
        )


def _fits(q: Any, k: Any, v: Any) -> int | No:
    """The head size of attention over q, k, v [batch, heads, sequence, d] with whole groups of heads, or why not."""
    kinds = [type_of_node(x) for x in (q, k, v)]
    if not all(kind is not None and kind.rank == 4 for kind in kinds):
        return No(f"q, k, v are {', '.join(map(str, kinds))}, not [batch, heads, sequence, d]")
    queries, keys, values = (kind for kind in kinds if kind is not None)
    heads, groups, size = queries.shape[1], keys.shape[1], queries.shape[3]
    if not isinstance(heads, int) or not isinstance(groups, int) or not isinstance(size, int):
        return No(f"q is {queries} and k {keys}: heads of dynamic number or size")
    if heads % groups or groups != values.shape[1] or queries.shape[0] != keys.shape[0]:
        return No(f"the heads of q ({queries}), k ({keys}) and v ({values}) do not go together")
    return size


def trimmed(args: list[Any]) -> list[Any]:
    """Arguments without the absent ones at the end."""
    while args and args[-1] is None:
        args = args[:-1]
    return args


def options(sight: masks.Sight, how: dict[str, Any]) -> dict[str, Any]:
    """The options of an attention that differ from the usual ones."""
    every = how | {name: getattr(sight, name) for name in ("left", "right", "chunk")}
    return {name: value for name, value in every.items() if USUAL.get(name) != value}


USUAL = {"left": -1, "right": -1, "chunk": 0, "softcap": 0.0}
RULES: tuple[Rule, ...] = (ScaledDotProduct(), EagerAttention())


# -- what stands around an attention ---------------------------------------------------------------------------


def ungroup(program: Program) -> int:
    """attention(q, repeat_kv(k), repeat_kv(v))  ->  attention(q, k, v), which takes fewer heads of k and v itself."""
    count = 0
    for node in program.calls(qc.attention):
        q, k, v = node.args[:3]
        one, other = _before_repeat(k), _before_repeat(v)
        if one is None or other is None or one.meta["type"].shape[1] != other.meta["type"].shape[1]:
            continue
        node.args = (q, one, other, *node.args[3:])
        count += 1
    return count


def _before_repeat(value: Any) -> fx.Node | None:
    """k [batch, groups, sequence, d] of one that repeats each group of heads."""
    x, sizes, shape, times = map(Capture, ("x", "sizes", "shape", "times"))
    repeated = op.reshape(op.expand(op.unsqueeze(x, -3), sizes), shape) | op.repeat_interleave(x, times, -3)
    found = matches(repeated, value)
    kind, source = type_of_node(value), type_of_node(found["x"]) if found else None
    if found is None or kind is None or source is None or source.rank != 4:
        return None
    groups, heads = source.shape[1], kind.shape[1]
    whole = isinstance(groups, int) and isinstance(heads, int) and heads % groups == 0
    rest = Type((kind.shape[0], groups, *kind.shape[2:]), kind.dtype)
    return found["x"] if whole and rest == source else None


def fold_masks(program: Program, refuse: Callable[[No], None]) -> int:
    """attention(q, k, v, mask)  ->  attention(q, k, v, None, padding, left=, right=, chunk=), if that is the mask."""
    count = 0
    for node in program.calls(qc.attention):
        given = arguments(node)
        if given["mask"] is None:
            continue
        seen = _sight(program, given)
        if isinstance(seen, No):
            refuse(No(f"its mask stays a tensor: {seen.reason}", f"{node.name} ({node.meta.get('path', '')})"))
            continue
        rounding = {name: value for name, value in node.kwargs.items() if name not in USUAL and name != "scale"}
        how = rounding | options(seen, {name: given[name] for name in ("scale", "softcap")})
        args = [*node.args[:3], None, seen.padding, given["bias"], given["sinks"]]
        program.replace(node, qc.attention, trimmed(args), how)
        count += 1
    return count


def _sight(program: Program, given: dict[str, Any]) -> masks.Sight | No:
    """What the queries of an attention see through its mask and what it says itself."""
    sight = masks.read_for(program, given["mask"], given["q"], given["k"])
    if isinstance(sight, No):
        return sight
    return sight.both(masks.Sight(given["padding"], given["left"], given["right"], given["chunk"]))
