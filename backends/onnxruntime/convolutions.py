"""Rules for convolutions: over floats, and over codes as QuantizeLinear and DequantizeLinear around them.

ONNX Runtime makes an integer convolution of DequantizeLinear on both operands and QuantizeLinear on the result.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.backends.onnxruntime.activations import quantizes
from qcompiler.backends.onnxruntime.graph import Stored
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, Unsupported, operator_name, schema_arguments
from qcompiler.backends.onnxruntime.products import spread
from qcompiler.backends.onnxruntime.shapes import rank
from qcompiler.backends.onnxruntime.weights import int8_codes, row_scales, signed
from qcompiler.errors import No
from qcompiler.program import Type
from qcompiler.rounding import activation_scheme
from qcompiler.scheme import QTensor


def convolution(
    low: Lowering, out: Type, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, *rest: Any,
) -> ir.Value:  # fmt: skip
    """Convolution over one to three axes; `aten.convolution` also says whether it is transposed."""
    if isinstance(padding, str):
        raise Unsupported(f'a convolution with padding "{padding}"')
    transposed, _, groups = rest if len(rest) == 3 else (False, 0, *rest)
    if transposed:
        raise Unsupported("a transposed convolution")
    stored = filters(low)
    if not isinstance(stored, No):
        weight, bias = decoded(low, *stored, bias)
    axes = rank(x) - 2
    pads = spread(padding, axes)
    how = {"strides": spread(stride, axes), "pads": [*pads, *pads], "dilations": spread(dilation, axes)}
    return low.op("Conv", x, weight, bias, group=groups, **how)


def filters(low: Lowering) -> tuple[str, QTensor, tuple[int, ...]] | No:
    """Name, record [n, everything else] and shape of the quantized filters that the node being lowered reads."""
    assert low.node is not None
    view = schema_arguments(low.node)[1]
    source = (
        view.args[0] if isinstance(view, fx.Node) and operator_name(view) in ("aten.view", "aten.reshape") else None
    )
    if not isinstance(source, fx.Node) or operator_name(source) != "qc.dequantize":
        return No("its filters are floats")
    name = str(source.args[0][0].target).partition("::")[0]  # type: ignore[index,union-attr]
    weight = low.program.qtensor(name)
    return name, weight, tuple(view.meta["type"].shape)


def decoded(
    low: Lowering, name: str, weight: QTensor, shape: tuple[int, ...], bias: ir.Value | None
) -> tuple[ir.Value, ir.Value | None]:
    """Filters and bias as DequantizeLinear of codes; the bias too where the input has codes, as integer kernels ask."""
    answer = signed(weight)
    if isinstance(answer, No):
        low.refusals.append(No(f"integer convolutions take {answer.reason}", name))
        make = lambda: weight.dequantize().view(shape)  # noqa: E731
        return low.graph.store(f"{name}::float", Stored(shape, weight.dtype, make, f"{name}::float")), bias
    scales = row_scales(weight)
    codes = Stored(shape, torch.int8, lambda: int8_codes(weight).view(shape), f"{name}::signed")
    scale = low.graph.store(
        f"{name}::row scales", Stored((weight.rows,), torch.float32, lambda: scales, f"{name}::rows")
    )
    filters = low.op("DequantizeLinear", low.graph.store(f"{name}::signed", codes), scale, axis=0)
    step = input_scale(low)
    low.kernels[low.label] = "Conv over codes" if step is not None else "Conv over decoded weights"
    return filters, bias if bias is None or step is None else rounded_bias(low, name, bias, step * scales)


def input_scale(low: Lowering) -> Tensor | None:
    """The scale of the codes that the node being lowered reads, if it reads static codes of 8 bits."""
    assert low.node is not None
    source: Any = low.node.args[0]
    if not isinstance(source, fx.Node) or operator_name(source) != "qc.fake_quantize":
        return None
    if isinstance(quantizes(activation_scheme(str(source.kwargs["scheme"]))), No):
        return None
    grid: Sequence[fx.Node] = source.args[1]  # type: ignore[assignment]
    return low.program.tensors[str(grid[0].target)].float().reshape(())


def rounded_bias(low: Lowering, name: str, bias: ir.Value, scales: Tensor) -> ir.Value:
    """A stored bias as int32 steps of the products' scales, which changes it by less than a product is rounded."""
    assert low.node is not None
    stored = low.program.tensor_of(schema_arguments(low.node)[2])
    if stored is None:
        return bias
    steps = (stored.double() / scales.double()).round()
    if not bool((steps.abs() < 2**31).all()):
        low.refusals.append(No("its bias has no 32-bit code", name))
        return bias
    made = Stored(tuple(stored.shape), torch.int32, lambda: steps.to(torch.int32), f"{name}::bias")
    scale = Stored(tuple(scales.shape), torch.float32, lambda: scales, f"{name}::bias scales")
    parts = (low.graph.store(f"{name}::bias", made), low.graph.store(f"{name}::bias scales", scale))
    return low.op("DequantizeLinear", *parts, axis=0)


RULES: dict[str, Rule] = dict.fromkeys(["aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"], convolution)
