"""Rules for rounded activations, and linear layers over them in integers."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.backends.onnxruntime.graph import Stored, sizes_of, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, Unsupported, schema_arguments
from qcompiler.backends.onnxruntime.weights import int8_codes, row_scales, signed
from qcompiler.errors import No
from qcompiler.program import Type
from qcompiler.rounding import activation_scheme, group_size
from qcompiler.scheme import QTensor, Scheme

TINY = 1e-30  # a scale that zeros can be divided by


def rounded(low: Lowering, x: ir.Value, grid: Sequence[ir.Value], scheme: str) -> ir.Value:
    """x rounded along its last axis and back, in standard operators; see `qcompiler.rounding`."""
    kind, sizes = activation_scheme(scheme), sizes_of(x)
    width = sizes[-1]
    if kind.code != "int" or not isinstance(width, int):
        raise Unsupported(f"activations rounded to {scheme}")
    size = group_size(kind, width)
    if width % size:
        raise Unsupported(f"{width} channels in groups of {size}, the last one shorter")
    grouped = typed(low.op("Reshape", x, [*([0] * (len(sizes) - 1)), width // size, size]), _wide(x, width, size))
    if grid:
        scale, *zero = (low.op("Unsqueeze", low.cast(part, torch.float32), [-1]) for part in grid)
        middle = zero[0] if zero else low.graph.constant(float(kind.levels >> 1))
    else:
        scale, middle = dynamic_grid(low, grouped, kind)
    value = to_grid(low, grouped, scale, middle, kind)
    back = low.op("Reshape", value, [*([0] * (len(sizes) - 1)), width])
    return typed(back, Type(sizes, torch.float32))


def _wide(x: ir.Value, width: int, size: int) -> Type:
    return Type((*sizes_of(x)[:-1], width // size, size), torch.float32)


def to_grid(low: Lowering, x: ir.Value, scale: ir.Value, middle: ir.Value, kind: Scheme) -> ir.Value:
    """The values that the codes of x stand for."""
    codes = low.op("Add", low.op("Round", low.op("Div", x, scale)), middle)
    codes = low.op("Clip", codes, low.graph.constant(0.0), low.graph.constant(float(kind.levels - 1)))
    return low.op("Mul", low.op("Sub", codes, middle), scale)


def dynamic_grid(low: Lowering, grouped: ir.Value, kind: Scheme, axis: int = -1) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of each group along an axis, as `grid_of` computes them.

    But for a symmetric group of zeros, whose scale it says is one: no scale changes what these zeros become.
    """
    if kind.symmetric:
        largest = low.op("Max", low.op("ReduceMax", low.op("Abs", grouped), [axis], keepdims=1), TINY)
        return low.op("Div", largest, float((kind.levels >> 1) - 1)), low.graph.constant(float(kind.levels >> 1))
    zero, one = low.graph.constant(0.0), low.graph.constant(1.0)
    low_end = low.op("Min", low.op("ReduceMin", grouped, [axis], keepdims=1), zero)
    high_end = low.op("Max", low.op("ReduceMax", grouped, [axis], keepdims=1), zero)
    span = low.op("Div", low.op("Sub", high_end, low_end), low.graph.constant(float(kind.levels - 1)))
    scale = low.op("Where", low.op("Greater", span, zero), span, one)
    middle = low.op("Round", low.op("Div", low.op("Neg", low_end), scale))
    return scale, low.op("Clip", middle, zero, low.graph.constant(float(kind.levels - 1)))


def fake_quantize(low: Lowering, out: Type, x: ir.Value, grid: Sequence[ir.Value], scheme: str) -> ir.Value:
    """An activation rounded to a grid and back: to 8 bits with one static scale by QuantizeLinear, which fuses."""
    assert low.node is not None
    kind = activation_scheme(scheme)
    if isinstance(quantizes(kind), No):
        return rounded(low, x, grid, scheme)
    scale, zero = _scalars(low, schema_arguments(low.node)[1])
    return low.op("DequantizeLinear", codes(low, x, scale, zero), scale, zero)


def quantizes(kind: Scheme) -> bool | No:
    """Whether QuantizeLinear makes the codes of a scheme."""
    static = not kind.dynamic and kind.granularity == "tensor"
    return (static and kind.bits == 8 and kind.code == "int") or No(f"activations of int8:tensor, not {kind}")


def codes(low: Lowering, x: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """The codes of x, shared by all that read them."""
    key = ("codes", x, scale, zero)
    if key not in low.memo:
        low.memo[key] = low.op("QuantizeLinear", x, scale, zero)
    value: ir.Value = low.memo[key]
    return value


def integer_product(
    low: Lowering,
    x: ir.Value,
    grid: Sequence[fx.Node],
    scheme: str,
    name: str,
    weight: QTensor,
    bias: ir.Value | None,
) -> ir.Value | No:
    """A product of 8-bit codes: one static scale for the activation or one a token, one a row for the weight."""
    kind, answer = activation_scheme(scheme), signed(weight)
    if isinstance(answer, No):
        return No(f"MatMulIntegerToFloat takes {answer.reason}")
    if quantizes(kind):
        return multiplied(low, *_codes_and_grid(low, x, grid), name, weight, bias)
    if kind.bits == 8 and kind.code == "int" and kind.granularity == "token":
        return by_token(low, x, kind, name, weight, bias)
    return No(f"MatMulIntegerToFloat takes activations of int8:tensor or int8:token, not {kind}")


def _codes_and_grid(low: Lowering, x: ir.Value, grid: Sequence[fx.Node]) -> tuple[ir.Value, ir.Value, ir.Value]:
    scale, zero = _scalars(low, grid)
    return codes(low, x, scale, zero), scale, zero


def multiplied(
    low: Lowering, x: ir.Value, scale: ir.Value, zero: ir.Value, name: str, weight: QTensor, bias: ir.Value | None
) -> ir.Value:
    """Codes x on one grid times the codes of a weight, added up in integers, plus bias."""
    scales, shape = row_scales(weight), (weight.columns, weight.rows)
    turned = Stored(
        shape,
        torch.int8,
        lambda: int8_codes(weight).T.contiguous(),
        f"{name}::signed",
        given=low.options.weights_given,
    )
    rows = low.graph.store(
        f"{name}::row scales", Stored((weight.rows,), torch.float32, lambda: scales, f"{name}::rows")
    )
    filters = low.graph.store(f"{name}::signed", turned)
    if low.options.opset_only:
        a, b = low.op("DequantizeLinear", x, scale, zero), low.op("DequantizeLinear", filters, rows, axis=1)
        product = low.op("MatMul", a, b)
        return product if bias is None else low.op("Add", product, bias)
    fused: ir.Value = low.contrib("MatMulIntegerToFloat", x, filters, scale, rows, zero, None, bias)
    return fused


def by_token(low: Lowering, x: ir.Value, kind: Scheme, name: str, weight: QTensor, bias: ir.Value | None) -> ir.Value:
    """A product over codes with a scale s and zero point z for each token: s (codes - 128) W' - s (z - 128) sum(W)."""
    key = ("token codes", x, str(kind))
    if key not in low.memo:
        scale, middle = dynamic_grid(low, x, kind)
        steps = low.op("Div", x, scale)
        shift = None if kind.symmetric else low.op("Sub", middle, low.graph.constant(128.0))
        moved = steps if shift is None else low.op("Add", low.op("Round", steps), shift)
        one, zero = low.graph.constant(1.0), low.graph.constant(torch.tensor(128, dtype=torch.uint8))
        low.memo[key] = low.op("QuantizeLinear", moved, one, zero), scale, shift
    quantized, scale, shift = low.memo[key]
    one, zero = low.graph.constant(1.0), low.graph.constant(torch.tensor(128, dtype=torch.uint8))
    product = multiplied(low, quantized, one, zero, name, weight, None)
    if shift is not None:
        sums = int8_codes(weight).sum(1).float() * row_scales(weight)
        stored = Stored(tuple(sums.shape), torch.float32, lambda: sums, f"{name}::sums")
        product = low.op("Sub", product, low.op("Mul", shift, low.graph.store(f"{name}::sums", stored)))
    product = low.op("Mul", product, scale)
    return product if bias is None else low.op("Add", product, bias)


def _scalars(low: Lowering, grid: Sequence[Any]) -> tuple[ir.Value, ir.Value]:
    """A static scale and zero point as constants without axes."""
    tensors = [low.program.tensors[str(part.target)] for part in grid]
    zero = tensors[1].reshape(()) if len(tensors) > 1 else torch.tensor(128, dtype=torch.uint8)
    return low.graph.constant(tensors[0].float().reshape(())), low.graph.constant(zero)


RULES: dict[str, Rule] = {"qc.fake_quantize": fake_quantize}
