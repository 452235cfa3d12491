"""Dense layers in other spellings, to aten.linear with a weight stored [n, k]."""

from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.program import Program
from qcompiler.rewrite import Pattern, Rule, op, type_of_node

aten = torch.ops.aten


class Addmm(Rule):
    """addmm(bias, x, w)  ->  linear(x, w', bias), w' = w transposed"""

    def pattern(self, bias: Pattern, x: Pattern, weight: Pattern) -> Pattern:
        return op.addmm(bias, x, weight)

    def rewrite(self, program: Program, node: fx.Node, bias: Any, x: Any, weight: Any) -> fx.Node | No:
        return _linear(program, node, x, weight, bias)


class Matmul(Rule):
    """x @ w with a stored w  ->  linear(x, w'), w' = w transposed"""

    def pattern(self, x: Pattern, weight: Pattern) -> Pattern:
        return op.mm(x, weight) | op.matmul(x, weight)

    def rewrite(self, program: Program, node: fx.Node, x: Any, weight: Any) -> fx.Node | No | None:
        return _linear(program, node, x, weight, None) if _is_stored(program, weight) else None


class Einsum(Rule):
    """einsum("bsk,nk->bsn", x, w)  ->  linear(x, w)"""

    def pattern(self, equation: Pattern, x: Pattern, weight: Pattern) -> Pattern:
        return op.einsum(equation, [x, weight])

    def rewrite(self, program: Program, node: fx.Node, equation: Any, x: Any, weight: Any) -> fx.Node | No | None:
        turned = _contraction(equation)
        if turned is None or not _is_stored(program, weight):
            return None
        if not turned:
            return _linear(program, node, x, weight, None)
        return program.call(aten.linear.default, (x, weight), like=node)


class LinearBias(Rule):
    """linear(x, w) + b with a stored b [n]  ->  linear(x, w, b)"""

    def pattern(self, x: Pattern, weight: Pattern, bias: Pattern) -> Pattern:
        return op.linear(x, weight) + bias

    def rewrite(self, program: Program, node: fx.Node, x: Any, weight: Any, bias: Any) -> fx.Node | No | None:
        stored, matrix = program.tensor_of(bias), type_of_node(weight)
        if stored is None or matrix is None or stored.shape != matrix.shape[:1]:
            return None
        return program.call(aten.linear.default, (x, weight, bias), like=node)


class FlatLinear(Rule):
    """reshape(linear(reshape(x, [-1, k]), w, bias), [..., n])  ->  linear(x, w, bias)"""

    def pattern(self, x: Pattern, flat: Pattern, weight: Pattern, bias: Pattern, shape: Pattern) -> Pattern:
        rows = op.reshape(x, flat)
        return op.reshape(op.linear(rows, weight) | op.linear(rows, weight, bias), shape)

    def rewrite(
        self, program: Program, node: fx.Node, x: Any, flat: Any, weight: Any, bias: Any, shape: Any
    ) -> fx.Node | No | None:
        source, result, matrix = map(type_of_node, (x, node, weight))
        if source is None or result is None or matrix is None or source.shape[-1] != matrix.shape[1]:
            return None
        if result.shape != (*source.shape[:-1], matrix.shape[0]):
            return None
        args = (x, weight) if bias is None else (x, weight, bias)
        return program.call(aten.linear.default, args, like=node)


def _contraction(equation: str) -> bool | None:
    """Whether "…k,nk->…n" has its weight as [n, k] (True) or [k, n] (False); None if it is something else.

    >>> _contraction("bsk,nk->bsn"), _contraction("...k,kn->...n"), _contraction("bqd,bkd->bqk")
    (True, False, None)
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    first, comma, second = left.partition(",")
    if not arrow or not comma or len(second) != 2 or not first or not result or first[:-1] != result[:-1]:
        return None
    k, n = first[-1], result[-1]
    if k == n or k in result or n in first:
        return None
    return {n + k: True, k + n: False}.get(second)


def _linear(program: Program, node: fx.Node, x: Any, weight: Any, bias: Any) -> fx.Node | No:
    """linear(x, weight transposed, bias) in the place of `node`."""
    source, result, matrix = type_of_node(x), type_of_node(node), type_of_node(weight)
    if not _is_stored(program, weight):
        return No("its weight is computed, not stored")
    if source is None or result is None or matrix is None or source.dtype != result.dtype:
        return No(f"x is {source} and the result {result}")
    if source.shape[-1] != matrix.shape[0] or result.shape != (*source.shape[:-1], matrix.shape[1]):
        return No(f"x of {source} times a weight of {matrix} is not {result}")
    offset = program.tensor_of(bias)
    if bias is not None and (offset is None or offset.shape != matrix.shape[1:]):
        return No("its bias is computed, or not one number for each output")
    args = (x, transposed(program, weight, node))
    return program.call(aten.linear.default, args if bias is None else (*args, bias), like=node)


def _is_stored(program: Program, weight: Any) -> bool:
    """Whether a weight is a stored matrix, as it is or transposed."""
    if isinstance(weight, fx.Node) and weight.target is aten.transpose.int:
        weight = weight.args[0]
    stored = program.tensor_of(weight)
    return stored is not None and stored.dim() == 2


def transposed(program: Program, weight: fx.Node, like: fx.Node) -> fx.Node:
    """The stored [n, k] form of a matrix [k, n]: under its own name if nobody else reads it."""
    if weight.op != "get_attr":
        return weight.args[0]  # type: ignore[return-value]
    name = str(weight.target)
    matrix = program.tensors[name].t().contiguous()
    if len(weight.users) > 1:
        name = f"{name}_transposed"
        program.tensors[name] = matrix
        return program.get(name, like)
    program.tensors[name] = matrix
    return program.get(name, like)


RULES: tuple[Rule, ...] = (Addmm(), Matmul(), Einsum(), FlatLinear(), LinearBias())
