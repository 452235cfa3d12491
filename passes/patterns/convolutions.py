"""What follows a convolution and can be part of it: a bias, and batch norm (Ioffe & Szegedy, arXiv 1502.03167)."""

from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.axis_convolutions import CONVOLUTIONS
from qcompiler.errors import No
from qcompiler.program import Program
from qcompiler.rewrite import Capture, Either, Pattern, Rule, named_arguments, op

aten = torch.ops.aten


def convolved(x: Pattern, weight: Pattern, bias: Pattern) -> Pattern:
    """A convolution over one to three axes, whatever its stride."""
    rest = {name: Capture(name) for name in ("stride", "padding", "dilation", "groups")}
    return Either(tuple(getattr(op, f"conv{n}d")(x, weight, bias, **rest) for n in (1, 2, 3)))


class ConvBias(Rule):
    """conv(x, w) + b with a stored b [n, 1, ...]  ->  conv(x, w, b)"""

    def pattern(self, x: Pattern, weight: Pattern, bias: Pattern) -> Pattern:
        return convolved(x, weight, None) + bias  # type: ignore[arg-type]

    def rewrite(self, program: Program, node: fx.Node, x: Any, weight: Any, bias: Any) -> fx.Node | No | None:
        filters, offset = program.tensor_of(weight), program.tensor_of(bias)
        if filters is None or offset is None:
            return None
        by_channel = (filters.shape[0], *[1] * (filters.dim() - 2))
        if tuple(offset.shape) not in (by_channel, (1, *by_channel)):
            return No(f"{list(offset.shape)} is added, which is not one number for each of {filters.shape[0]} channels")
        stored = program.store(f"{bias.target}.flat", offset.flatten(), like=node)
        return with_filters(program, node, weight, stored)


class ConvBatchNorm(Rule):
    """batch_norm(conv(x, w, b), mean, variance)  ->  conv(x, w', b'), both scaled by weight / sqrt(variance + eps)"""

    def pattern(self, x: Pattern, weight: Pattern, bias: Pattern) -> Pattern:
        norm = [Capture(name) for name in ("scale", "shift", "mean", "variance")]
        inner = convolved(x, weight, bias)
        return op.batch_norm(inner, *norm, False, Capture("momentum"), Capture("eps"), Capture("cudnn"))

    def rewrite(self, program: Program, node: fx.Node, x: Any, weight: Any, bias: Any) -> fx.Node | No | None:
        given = named_arguments(node)
        parts = [given[n] for n in ("weight", "bias", "running_mean", "running_var")]
        scale, shift, mean, variance = (program.tensor_of(part) for part in parts)
        filters, offset = program.tensor_of(weight), program.tensor_of(bias)
        if filters is None or mean is None or variance is None or (bias is not None and offset is None):
            return No("its filters or its statistics are computed, not stored")
        factor = (variance.double() + given["eps"]).rsqrt()
        factor = factor if scale is None else factor * scale.double()
        moved = (torch.zeros_like(mean).double() if offset is None else offset.double()) - mean.double()
        moved = moved * factor if shift is None else moved * factor + shift.double()
        name = str(weight.target)
        made = (filters.double() * factor.view(-1, *[1] * (filters.dim() - 1))).to(filters.dtype)
        stored = [program.store(f"{name}.{n}", t, like=node) for n, t in (("folded", made), ("bias", _as(moved, made)))]
        return with_filters(program, node, *stored)


def _as(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)


def with_filters(program: Program, node: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
    """The convolution that `node` reads, with another weight and bias."""
    convolution = next(n for n in node.all_input_nodes if n.target in CONVOLUTIONS)
    rest = convolution.args[3:]
    return program.call(convolution.target, (convolution.args[0], weight, bias, *rest), convolution.kwargs, like=node)


RULES: tuple[Rule, ...] = (ConvBias(), ConvBatchNorm())
