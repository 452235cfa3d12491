"""RMS and layer norms in the spellings of transformers. Sources: arXiv 1910.07467, arXiv 1607.06450."""

from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.program import Program
from qcompiler.rewrite import Pattern, Rule, op, same, type_of_node

aten = torch.ops.aten


def square(x: Pattern) -> Pattern:
    """x * x, as a power or as a product."""
    return op.pow(x, 2) | x * x | op.square(x)


def divided_by_root(x: Pattern, mean: Pattern, eps: Pattern) -> Pattern:
    """x / sqrt(mean + eps)."""
    inside = mean + eps
    inverse = op.rsqrt(inside) | op.pow(inside, -0.5) | op.reciprocal(op.sqrt(inside)) | op.pow(op.sqrt(inside), -1)
    return x * inverse | x / op.sqrt(inside) | x / op.pow(inside, 0.5)


class RmsNorm(Rule):
    """x * rsqrt(mean(x ** 2, -1) + eps)  ->  rms_norm(x, [d], None, eps)"""

    near = 3

    def pattern(self, x: Pattern, dims: Pattern, eps: Pattern) -> Pattern:
        return divided_by_root(x, op.mean(square(x), dims, True), eps)

    def rewrite(self, program: Program, node: fx.Node, x: Any, dims: Any, eps: Any) -> fx.Node | No:
        answer = _last_channels(x, dims, eps)
        if isinstance(answer, No):
            return answer
        return program.call(aten.rms_norm.default, (x, [answer], None, eps), like=node)


class RmsNormWeight(Rule):
    """w * rms_norm(x, [d], None, eps)  ->  rms_norm(x, [d], w, eps)"""

    def pattern(self, x: Pattern, shape: Pattern, eps: Pattern, weight: Pattern) -> Pattern:
        return op.rms_norm(x, shape, None, eps) * weight

    def rewrite(self, program: Program, node: fx.Node, x: Any, shape: Any, eps: Any, weight: Any) -> fx.Node | None:
        if not _is_weight(program, weight, shape) or type_of_node(x) != type_of_node(node):
            return None
        return program.call(aten.rms_norm.default, (x, shape, weight, eps), like=node)


class LayerNorm(Rule):
    """(x - mean(x)) * rsqrt(mean((x - mean(x)) ** 2) + eps)  ->  layer_norm(x, [d], None, None, eps)"""

    def pattern(self, x: Pattern, dims: Pattern, eps: Pattern) -> Pattern:
        centred = x - op.mean(x, dims, True)
        variance = (
            op.mean(square(centred), dims, True)
            | op.var(x, dims, False, True)
            | op.var(x, dims, correction=0, keepdim=True)
        )
        return divided_by_root(centred, variance, eps)

    def rewrite(self, program: Program, node: fx.Node, x: Any, dims: Any, eps: Any) -> fx.Node | No:
        answer = _last_channels(x, dims, eps)
        if isinstance(answer, No):
            return answer
        return program.call(aten.layer_norm.default, (x, [answer], None, None, eps), like=node)


class LayerNormWeight(Rule):
    """w * layer_norm(x, [d], None, None, eps)  ->  layer_norm(x, [d], w, None, eps)"""

    def pattern(self, x: Pattern, shape: Pattern, eps: Pattern, weight: Pattern) -> Pattern:
        return (op.layer_norm(x, shape, None, None, eps) | op.layer_norm(x, shape, None, None, eps, False)) * weight

    def rewrite(self, program: Program, node: fx.Node, x: Any, shape: Any, eps: Any, weight: Any) -> fx.Node | None:
        if not _is_weight(program, weight, shape) or type_of_node(x) != type_of_node(node):
            return None
        return program.call(aten.layer_norm.default, (x, shape, weight, None, eps), like=node)


class LayerNormBias(Rule):
    """layer_norm(x, [d], w, None, eps) + b  ->  layer_norm(x, [d], w, b, eps)"""

    def pattern(self, x: Pattern, shape: Pattern, weight: Pattern, eps: Pattern, bias: Pattern) -> Pattern:
        return op.layer_norm(x, shape, weight, None, eps) + bias

    def rewrite(
        self, program: Program, node: fx.Node, x: Any, shape: Any, weight: Any, eps: Any, bias: Any
    ) -> fx.Node | None:
        if weight is None or not _is_weight(program, bias, shape) or type_of_node(x) != type_of_node(node):
            return None
        return program.call(aten.layer_norm.default, (x, shape, weight, bias, eps), like=node)


def _last_channels(x: Any, dims: Any, eps: Any) -> int | No:
    """The number of channels that a mean over `dims` runs over, if a norm operator can do that."""
    kind = type_of_node(x)
    if kind is None or not same(dims, [-1]):
        return No(f"the mean runs over dimensions {dims}, not over the last one")
    if not isinstance(eps, (int, float)):
        return No("the epsilon is computed")
    if kind.dtype.itemsize < 4:
        return No(f"{kind.dtype} is rounded after each step here, and once in the norm operator")
    channels = kind.shape[-1]
    return channels if isinstance(channels, int) else No(f"the last dimension is dynamic ({channels})")


def _is_weight(program: Program, weight: Any, shape: Any) -> bool:
    stored = program.tensor_of(weight)
    return stored is not None and list(stored.shape) == list(shape)


# A layer norm is an RMS norm of centred values: it must be looked for first.
RULES: tuple[Rule, ...] = (LayerNorm(), LayerNormWeight(), LayerNormBias(), RmsNorm(), RmsNormWeight())
