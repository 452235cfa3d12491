"""Activations that a model spells out."""

import math
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.program import Program
from qcompiler.rewrite import Pattern, Rule, op, type_of_node

aten = torch.ops.aten


class GeluTanh(Rule):
    """0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3)))  ->  gelu(x, approximate="tanh"). Source: arXiv 1606.08415."""

    def pattern(self, x: Pattern, cubic: Pattern, root: Pattern) -> Pattern:
        inner = (x + op.pow(x, 3) * cubic) * root | x * root * (x * cubic * x + 1)
        return x * 0.5 * (op.tanh(inner) + 1)

    def rewrite(self, program: Program, node: fx.Node, x: Any, cubic: Any, root: Any) -> fx.Node | No | None:
        if not _close(cubic, 0.044715) or not _close(root, math.sqrt(2 / math.pi)) or _rounds(x):
            return None
        return program.call(aten.gelu.default, (x,), {"approximate": "tanh"}, like=node)


class GeluErf(Rule):
    """x * 0.5 * (1 + erf(x / sqrt(2)))  ->  gelu(x). Source: arXiv 1606.08415."""

    def pattern(self, x: Pattern, root: Pattern, inverse: Pattern) -> Pattern:
        half = op.erf(x / root) + 1 | op.erf(x * inverse) + 1
        return x * half * 0.5 | x * 0.5 * half | x * (half * 0.5)

    def rewrite(self, program: Program, node: fx.Node, x: Any, root: Any, inverse: Any) -> fx.Node | None:
        if not (_close(root, math.sqrt(2)) or _close(inverse, math.sqrt(0.5))) or _rounds(x):
            return None
        return program.call(aten.gelu.default, (x,), like=node)


class Silu(Rule):
    """x * sigmoid(x)  ->  silu(x)"""

    def pattern(self, x: Pattern) -> Pattern:
        return x * op.sigmoid(x)

    def rewrite(self, program: Program, node: fx.Node, x: Any) -> fx.Node | None:
        return program.call(aten.silu.default, (x,), like=node) if not _rounds(x) else None


class HardSwish(Rule):
    """x * clamp(x + 3, 0, 6) / 6  ->  hardswish(x). Source: MobileNetV3 (arXiv 1905.02244), section 5.2."""

    def pattern(self, x: Pattern, sixth: Pattern) -> Pattern:
        gate = op.clamp(x + 3, 0, 6)
        return x * gate / 6 | x * (gate / 6) | x * gate * sixth | x * (gate * sixth)

    def rewrite(self, program: Program, node: fx.Node, x: Any, sixth: Any) -> fx.Node | None:
        if (sixth is not None and not _close(sixth, 1 / 6)) or _rounds(x):
            return None
        return program.call(aten.hardswish.default, (x,), like=node)


def _close(value: Any, wanted: float) -> bool:
    return isinstance(value, float) and math.isclose(value, wanted, rel_tol=1e-6)


def _rounds(x: Any) -> bool:
    """Whether x is of half precision: it is rounded after each step when spelled out, and once by the operator."""
    kind = type_of_node(x)
    return kind is None or kind.dtype.itemsize < 4


RULES: tuple[Rule, ...] = (GeluTanh(), GeluErf(), HardSwish(), Silu())
