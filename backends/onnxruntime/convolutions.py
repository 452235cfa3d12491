"""Rules for convolutions: over floats, and over codes as QuantizeLinear and DequantizeLinear around them.

ONNX Runtime makes an integer convolution of DequantizeLinear on both operands and QuantizeLinear on the result; it
rounds the bias itself.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

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
        weight = decoded(low, weight, *stored)
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


def decoded(low: Lowering, floats: ir.Value, name: str, weight: QTensor, shape: tuple[int, ...]) -> ir.Value:
    """Filters as DequantizeLinear of codes for an integer kernel, or the floats where there is none."""
    answer = signed(weight)
    if isinstance(answer, No):
        low.refusals.append(No(f"integer convolutions take {answer.reason}", name))
        return floats
    if not reads_codes(low):
        low.kernels[low.label] = "Conv over decoded weights"
        return floats
    scales = row_scales(weight)
    codes = Stored(shape, torch.int8, lambda: int8_codes(weight).view(shape), f"{name}::signed")
    rows = Stored((weight.rows,), torch.float32, lambda: scales, f"{name}::rows")
    low.kernels[low.label] = "Conv over codes"
    parts = low.graph.store(f"{name}::signed", codes), low.graph.store(f"{name}::row scales", rows)
    return low.op("DequantizeLinear", *parts, axis=0)


def reads_codes(low: Lowering) -> bool:
    """Whether the node being lowered reads static codes of 8 bits."""
    assert low.node is not None
    source = low.node.args[0]
    if not isinstance(source, fx.Node) or operator_name(source) != "qc.fake_quantize":
        return False
    return bool(quantizes(activation_scheme(str(source.kwargs["scheme"]))))


RULES: dict[str, Rule] = dict.fromkeys(["aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"], convolution)
