"""Rules for rounded activations, and linear layers over them in integers."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.backends.onnxruntime.graph import Stored, sizes_of, typed
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, Unsupported, schema_arguments
from qcompiler.errors import No
from qcompiler.program import Type
from qcompiler.rounding import activation_scheme, group_size
from qcompiler.scheme import QTensor, Scheme


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
    """Scale and zero point of each group along an axis, as `grid_of` computes them."""
    zero, one = low.graph.constant(0.0), low.graph.constant(1.0)
    low_end = low.op("Min", low.op("ReduceMin", grouped, [axis], keepdims=1), zero)
    high_end = low.op("Max", low.op("ReduceMax", grouped, [axis], keepdims=1), zero)
    if kind.symmetric:
        high_end = low.op("Max", low.op("Neg", low_end), high_end)
        low_end = low.op("Neg", high_end)
    steps = float(kind.levels - (2 if kind.symmetric else 1))
    span = low.op("Div", low.op("Sub", high_end, low_end), low.graph.constant(steps))
    scale = low.op("Where", low.op("Greater", span, zero), span, one)
    if kind.symmetric:
        return scale, low.graph.constant(float(kind.levels >> 1))
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
    """A product of 8-bit codes: one static scale for the activation, one a row for the weight."""
    kind = activation_scheme(scheme)
    answer = quantizes(kind)
    if isinstance(answer, No):
        return No(f"MatMulIntegerToFloat takes {answer.reason}")
    whole = weight.scheme.granularity in ("channel", "tensor") and weight.zero is None and weight.minimum is None
    if weight.scheme.bits != 8 or weight.scheme.code != "int" or not whole or not isinstance(weight.scale, Tensor):
        return No(f"MatMulIntegerToFloat takes weights of int8:channel:sym, not {weight.scheme}")
    scale, zero = _scalars(low, grid)
    rows = weight.scale.float().expand(weight.rows, 1).flatten().contiguous()
    signed = Stored(
        (weight.columns, weight.rows),
        torch.int8,
        lambda: (weight.unpacked().to(torch.int16) - 128).to(torch.int8).T.contiguous(),
        f"{name}::signed",
    )
    product: ir.Value = low.contrib(
        "MatMulIntegerToFloat",
        codes(low, x, scale, zero),
        low.graph.store(f"{name}::signed", signed),
        scale,
        low.graph.store(f"{name}::row scales", Stored((weight.rows,), torch.float32, lambda: rows, f"{name}::rows")),
        zero,
        None,
        bias,
    )
    return product


def _scalars(low: Lowering, grid: Sequence[Any]) -> tuple[ir.Value, ir.Value]:
    """A static scale and zero point as constants without axes."""
    tensors = [low.program.tensors[str(part.target)] for part in grid]
    zero = tensors[1].reshape(()) if len(tensors) > 1 else torch.tensor(128, dtype=torch.uint8)
    return low.graph.constant(tensors[0].float().reshape(())), low.graph.constant(zero)


RULES: dict[str, Rule] = {"qc.fake_quantize": fake_quantize}
