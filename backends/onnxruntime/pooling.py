"""Rules for operators over positions of images and signals: pooling and batch norm."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompiler.backends.onnxruntime.graph import dtype_of, sizes_of
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, Unsupported
from qcompiler.backends.onnxruntime.products import spread
from qcompiler.backends.onnxruntime.shapes import rank
from qcompiler.program import Type


def max_pool(
    low: Lowering, out: Type, x: ir.Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil: bool = False,
) -> ir.Value:  # fmt: skip
    """The largest value in each window."""
    how = window(low, x, kernel, stride, padding, ceil)
    return low.op("MaxPool", x, dilations=spread(dilation, rank(x) - 2), **how)


def average_pool(
    low: Lowering, out: Type, x: ir.Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False,
    counted: bool = True, divisor: int | None = None,
) -> ir.Value:  # fmt: skip
    """The mean over each window; padding counts or does not."""
    if divisor is not None:
        raise Unsupported(f"means that are divided by {divisor}, whatever the window")
    return low.op("AveragePool", x, count_include_pad=int(counted), **window(low, x, kernel, stride, padding, ceil))


def window(low: Lowering, x: ir.Value, kernel: Any, stride: Any, padding: Any, ceil: bool) -> dict[str, Any]:
    """The attributes that pooling operators share; without a stride the windows lie side by side."""
    if ceil:
        raise Unsupported("windows that reach beyond the edge (ceil_mode)")
    axes = rank(x) - 2
    sizes, pads = spread(kernel, axes), spread(padding, axes)
    steps = stride if isinstance(stride, int) or len(stride) else kernel
    return {"kernel_shape": sizes, "strides": spread(steps, axes), "pads": [*pads, *pads]}


def batch_norm(
    low: Lowering, out: Type, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None, mean: ir.Value | None,
    variance: ir.Value | None, training: bool, momentum: float, eps: float, *rest: Any,
) -> ir.Value:  # fmt: skip
    """Each channel centred and scaled by stored numbers."""
    if training or mean is None or variance is None:
        raise Unsupported("a batch norm that measures its batch")
    channels, dtype = sizes_of(x)[1], dtype_of(x)
    assert isinstance(channels, int)
    weight = weight if weight is not None else low.graph.constant(torch.ones(channels, dtype=dtype))
    bias = bias if bias is not None else low.graph.constant(torch.zeros(channels, dtype=dtype))
    return low.op("BatchNormalization", x, weight, bias, mean, variance, epsilon=eps)


def broadcast(low: Lowering, out: Any, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Values expanded to one shape, two at a time."""
    if len(values) != 2:
        raise Unsupported(f"{len(values)} values broadcast together")
    shapes = [low.op("Shape", value) for value in values]
    return [low.op("Expand", value, shape) for value, shape in zip(values, shapes[::-1], strict=True)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(["aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d"], max_pool),
    **dict.fromkeys(["aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d"], average_pool),
    "aten.batch_norm": batch_norm,
    "aten.broadcast_tensors": broadcast,
}
