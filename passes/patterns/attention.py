"""Attention in other spellings, to qc.attention; masks and repeated keys folded into it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.ops import default_scale, qc
from qcompiler.passes.patterns import masks
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
        return program.call(qc.attention, (q, k, v, mask), how, like=node)


class EagerAttention(Rule):
    """softmax(q @ k' * scale + mask, -1) @ v  ->  qc.attention(q, k, v, mask, scale=)"""

    near = 2

    def pattern(self, q: Pattern, k: Pattern, v: Pattern, scale: Pattern, divisor: Pattern, added: Pattern) -> Pattern:
        product = op.matmul(q, op.transpose(k, -2, -1))
        scores = product * scale | product / divisor | product
        masked = scores + added | scores
        return op.matmul(op.softmax(masked, -1) | op.softmax(masked, -1, Capture("dtype")), v)

    def rewrite(
        self, program: Program, node: fx.Node, q: Any, k: Any, v: Any, scale: Any, divisor: Any, added: Any
    ) -> fx.Node | No:
        answer = _fits(q, k, v)
        if isinstance(answer, No):
            return answer
        factor, share = (masks.constant(program, 1.0 if s is None else s) for s in (scale, divisor))
        if factor is None or not share:
            return No("its scale is computed")
        if added is not None and type_of_node(added) is None:
            return No(f"{added} is added to its scores")
        return program.call(qc.attention, (q, k, v, added), {"scale": factor / share}, like=node)


class FilledAttention(Rule):
    """softmax(where(seen, q @ k' * scale, -inf), -1) @ v  ->  qc.attention(q, k, v, seen, scale=)"""

    def pattern(
        self,
        q: Pattern,
        k: Pattern,
        v: Pattern,
        scale: Pattern,
        divisor: Pattern,
        seen: Pattern,
        hidden: Pattern,
        low: Pattern,
    ) -> Pattern:
        product = op.matmul(q, op.transpose(k, -2, -1))
        scores = product * scale | product / divisor | product
        masked = op.where(seen, scores, low) | op.masked_fill(scores, hidden, low)
        return op.matmul(op.softmax(masked, -1) | op.softmax(masked, -1, Capture("dtype")), v)

    def rewrite(
        self,
        program: Program,
        node: fx.Node,
        q: Any,
        k: Any,
        v: Any,
        scale: Any,
        divisor: Any,
        seen: Any,
        hidden: Any,
        low: Any,
    ) -> fx.Node | No:
        answer = _fits(q, k, v)
        if isinstance(answer, No):
            return answer
        factor, share = (masks.constant(program, 1.0 if s is None else s) for s in (scale, divisor))
        if factor is None or not share:
            return No("its scale is computed")
        if not masks.is_low(program, low):
            return No(f"hidden scores become {low}, which is not a large negative number")
        if seen is None:
            seen = program.call(aten.logical_not.default, (hidden,), like=node, type=hidden.meta["type"])
        return program.call(qc.attention, (q, k, v, seen), {"scale": factor / share}, like=node)


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


RULES: tuple[Rule, ...] = (ScaledDotProduct(), EagerAttention(), FilledAttention())


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
        how = {name: given[name] for name in ("scale", "softcap")} | {
            name: getattr(seen, name) for name in ("left", "right", "chunk")
        }
        usual = {"left": -1, "right": -1, "chunk": 0, "softcap": 0.0}
        how = {name: value for name, value in how.items() if usual.get(name) != value}
        args = [*node.args[:3], None, seen.padding, given["bias"], given["sinks"]]
        while args[-1] is None:
            args.pop()
        program.replace(node, qc.attention, args, how)
        count += 1
    return count


def _sight(program: Program, given: dict[str, Any]) -> masks.Sight | No:
    """What the queries of an attention see through its mask and what it says itself."""
    mask = type_of_node(given["mask"])
    sizes = given["q"].meta["type"].shape[2], given["k"].meta["type"].shape[2]
    if mask is None or mask.shape[-2:] not in (sizes, (1, sizes[1])):
        return No(f"it is {mask}, not [batch, 1, {sizes[0]}, {sizes[1]}]")
    sight = masks.read(program, given["mask"])
    if isinstance(sight, No):
        return sight
    return sight.both(masks.Sight(given["padding"], given["left"], given["right"], given["chunk"]))
