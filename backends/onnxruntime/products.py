"""Rules for operators that combine many values: products, norms, reductions, convolutions."""

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.backends.onnxruntime.graph import sizes_of
from qcompiler.backends.onnxruntime.lowering import (
    Lowering,
    Rule,
    Unsupported,
    operator_name,
    schema_arguments,
)
from qcompiler.backends.onnxruntime.shapes import rank
from qcompiler.errors import No
from qcompiler.hadamard import base_order, paley, sylvester
from qcompiler.program import Type


def linear(low: Lowering, out: Type, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    """x times the transposed weight, plus bias; a stored weight that nothing else reads is written transposed."""
    assert low.node is not None
    source = schema_arguments(low.node)[1]
    tied = source.op == "get_attr" and is_tied(low, source)
    if source.op != "get_attr" or (tied and low.options.opset_only):
        product = low.op("MatMul", x, low.op("Transpose", weight, perm=[1, 0]))
    elif tied:
        product = low.contrib("FusedMatMul", x, weight, transB=1)
    else:
        product = low.op("MatMul", x, low.transposed(str(source.target)))
    return product if bias is None else low.op("Add", product, bias)


def is_tied(low: Lowering, source: fx.Node) -> bool:
    """Whether a stored weight is read by anything but linear layers, as an embedding is: one copy serves both."""
    readers = [n for n in low.program.graph.nodes if n.op == "get_attr" and n.target == source.target]
    return any(operator_name(user) != "aten.linear" for reader in readers for user in reader.users)


def matmul(low: Lowering, out: Type, a: ir.Value, b: ir.Value) -> ir.Value:
    """Matrix product."""
    return low.op("MatMul", a, b)


def addmm(
    low: Lowering, out: Type, c: ir.Value, a: ir.Value, b: ir.Value, beta: float = 1, alpha: float = 1
) -> ir.Value:
    """beta * c + alpha * a @ b."""
    product = low.op("MatMul", a, b)
    if alpha != 1:
        product = low.op("Mul", product, low.cast(alpha, out.dtype))
    return low.op("Add", product, c if beta == 1 else low.op("Mul", c, low.cast(beta, out.dtype)))


def einsum(low: Lowering, out: Type, equation: str, values: Sequence[ir.Value], *rest: Any) -> ir.Value:
    """Products and sums named by letters."""
    return low.op("Einsum", *values, equation=equation)


def reduction(kind: str) -> Rule:
    """A reduction over some axes (all, if none are given)."""

    def rule(low: Lowering, out: Type, x: ir.Value, axes: Any = None, keep: bool = False, *rest: Any) -> ir.Value:
        assert low.node is not None
        if "dim" not in [a.name for a in low.node.target._schema.arguments]:  # type: ignore[union-attr]
            axes, keep = None, False
        named = [axes] if isinstance(axes, int) else list(axes or range(rank(x)))
        axes_value = low.shape([axis % max(rank(x), 1) for axis in named])
        return low.op(kind, low.cast(x, out.dtype), axes_value, keepdims=int(keep))

    return rule


def any_of(low: Lowering, out: Type, x: ir.Value, *rest: Any) -> ir.Value:
    """Whether any is true."""
    found = reduction("ReduceMax")(low, Type(out.shape, torch.int32), low.cast(x, torch.bool), *rest)
    return low.op("Cast", found, to=int(ir.DataType.BOOL))


def all_of(low: Lowering, out: Type, x: ir.Value, *rest: Any) -> ir.Value:
    """Whether all are true."""
    found = reduction("ReduceMin")(low, Type(out.shape, torch.int32), low.cast(x, torch.bool), *rest)
    return low.op("Cast", found, to=int(ir.DataType.BOOL))


def extreme(kind: str) -> Rule:
    """The position of the largest or smallest value."""

    def rule(low: Lowering, out: Type, x: ir.Value, axis: int | None = None, keep: bool = False) -> ir.Value:
        if axis is None:
            return low.op(kind, low.op("Reshape", x, [-1]), axis=0, keepdims=0)
        return low.op(kind, x, axis=axis % rank(x), keepdims=int(keep))

    return rule


def best(kind: str, where: str) -> Rule:
    """The largest or smallest value along an axis, and its position."""

    def rule(low: Lowering, out: Any, x: ir.Value, axis: Any = None, keep: bool = False) -> Any:
        if isinstance(axis, ir.Value):
            return low.op({"ReduceMax": "Max", "ReduceMin": "Min"}[kind], x, axis)
        if axis is None:
            return low.op(kind, x, keepdims=0)
        axis %= rank(x)
        values = low.op(kind, x, [axis], keepdims=int(keep))
        return [values, low.op(where, x, axis=axis, keepdims=int(keep))]

    return rule


def variance(
    low: Lowering, out: Type, x: ir.Value, axes: Any = None, correction: Any = None, keep: bool = False
) -> ir.Value:
    """The variance over some axes of known size."""
    if isinstance(correction, bool):  # var(x, dim, unbiased, keepdim)
        correction = int(correction)
    named = [axes] if isinstance(axes, int) else list(axes or range(rank(x)))
    count = 1
    for axis in named:
        size = sizes_of(x)[axis]
        if not isinstance(size, int):
            raise Unsupported("the variance over an axis whose size is not known")
        count *= size
    value = low.shape([axis % rank(x) for axis in named])
    centred = low.op("Sub", x, low.op("ReduceMean", x, value, keepdims=1))
    mean = low.op("ReduceMean", low.op("Mul", centred, centred), value, keepdims=int(keep))
    left = 1 if correction is None else correction
    return low.op("Mul", mean, low.cast(count / (count - left), out.dtype)) if left else mean


def softmax(kind: str) -> Rule:
    """(Log-)softmax along an axis."""
    return lambda low, out, x, axis, *rest: low.op(kind, low.cast(x, out.dtype), axis=axis % rank(x))


def cumsum(low: Lowering, out: Type, x: ir.Value, axis: int, *rest: Any) -> ir.Value:
    """Running sums."""
    return low.op("CumSum", low.cast(x, out.dtype), low.graph.constant(axis % rank(x)))


def topk(low: Lowering, out: Any, x: ir.Value, k: Any, axis: int = -1, largest: bool = True, order: bool = True) -> Any:
    """The k largest or smallest values along an axis, and their positions."""
    count = low.shape([k])
    return low.ops("TopK", x, count, outputs=2, axis=axis % rank(x), largest=int(largest), sorted=int(order))


def sort(low: Lowering, out: Any, x: ir.Value, axis: int = -1, descending: bool = False) -> Any:
    """All values along an axis in order, and where they were."""
    return topk(low, out, x, low.size(x, axis), axis, descending)


def layer_norm(
    low: Lowering,
    out: Type,
    x: ir.Value,
    shape: Sequence[int],
    weight: ir.Value | None = None,
    bias: ir.Value | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> ir.Value:
    """Centred and scaled over the last axes."""
    weight = weight if weight is not None else low.graph.constant(torch.ones(tuple(shape), dtype=out.dtype))
    return low.op("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=eps)


def rms_norm(
    low: Lowering,
    out: Type,
    x: ir.Value,
    shape: Sequence[int],
    weight: ir.Value | None = None,
    eps: float | None = None,
) -> ir.Value:
    """Scaled over the last axes by their root mean square."""
    weight = weight if weight is not None else low.graph.constant(torch.ones(tuple(shape), dtype=out.dtype))
    small = torch.finfo(out.dtype).eps if eps is None else eps
    return low.op("RMSNormalization", x, weight, axis=-len(shape), epsilon=small)


def reordered_norm(
    low: Lowering,
    out: Type,
    x: ir.Value,
    weight: ir.Value | None,
    bias: ir.Value | None,
    order: ir.Value,
    kind: str,
    eps: float,
) -> ir.Value:
    """A norm that stores in another order: there is no such operator, so a gather follows the norm."""
    low.refusals.append(
        No("no norm stores in another order: a gather follows it; rptq{norms=residual} needs none", low.label)
    )
    if kind == "rms":
        normed = rms_norm(low, out, x, out.shape[-1:], weight, eps)  # type: ignore[arg-type]
    else:
        normed = layer_norm(low, out, x, out.shape[-1:], weight, bias, eps)  # type: ignore[arg-type]
    return low.op("Gather", normed, order, axis=-1)


def group_norm(
    low: Lowering,
    out: Type,
    x: ir.Value,
    groups: int,
    weight: ir.Value | None = None,
    bias: ir.Value | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> ir.Value:
    """Centred and scaled over groups of channels."""
    channels = sizes_of(x)[1]
    assert isinstance(channels, int)
    weight = weight if weight is not None else low.graph.constant(torch.ones(channels, dtype=out.dtype))
    bias = bias if bias is not None else low.graph.constant(torch.zeros(channels, dtype=out.dtype))
    return low.op("GroupNormalization", x, weight, bias, num_groups=groups, epsilon=eps)


def spread(value: Any, count: int) -> list[int]:
    """One number for each axis."""
    given = [value] if isinstance(value, int) else list(value)
    return given * count if len(given) == 1 else given


def hadamard(low: Lowering, out: Type, x: ir.Value, size: int) -> ir.Value:
    """Blocks of channels mixed by a Hadamard matrix: by its two small Kronecker factors."""
    base = base_order(size)
    assert base is not None, size
    before, width = out.shape[:-1], out.shape[-1]
    assert isinstance(width, int)
    y = low.op("Reshape", x, [*([0] * len(before)), width // size, base, size // base])
    if base > 1:
        y = low.op("MatMul", low.graph.constant(paley(base), out.dtype), y)
    factor = sylvester(size // base) / math.sqrt(size)
    y = low.op("MatMul", y, low.graph.constant(factor, out.dtype))
    return low.op("Reshape", y, [*([0] * len(before)), width])


RULES: dict[str, Rule] = {
    "aten.linear": linear,
    **dict.fromkeys(["aten.matmul", "aten.mm", "aten.bmm"], matmul),
    **dict.fromkeys(["aten.addmm", "aten.baddbmm"], addmm),
    "aten.einsum": einsum,
    "aten.sum": reduction("ReduceSum"),
    "aten.mean": reduction("ReduceMean"),
    "aten.amax": reduction("ReduceMax"),
    "aten.amin": reduction("ReduceMin"),
    "aten.prod": reduction("ReduceProd"),
    "aten.logsumexp": reduction("ReduceLogSumExp"),
    "aten.any": any_of,
    "aten.all": all_of,
    "aten.argmax": extreme("ArgMax"),
    "aten.argmin": extreme("ArgMin"),
    "aten.max": best("ReduceMax", "ArgMax"),
    "aten.min": best("ReduceMin", "ArgMin"),
    "aten.var": variance,
    **dict.fromkeys(["aten.softmax", "aten._softmax"], softmax("Softmax")),
    **dict.fromkeys(["aten.log_softmax", "aten._log_softmax"], softmax("LogSoftmax")),
    "aten.cumsum": cumsum,
    "aten.topk": topk,
    "aten.sort": sort,
    "aten.layer_norm": layer_norm,
    "aten.rms_norm": rms_norm,
    "qc.reordered_norm": reordered_norm,
    "qc.hadamard": hadamard,
    "aten.group_norm": group_norm,
}
