"""The ONNX operators that only move, select or make elements, as ATen operators; see `onnx_rules`."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.formats.onnx_model import DTYPES
from qcompiler.frontends.onnx_graph import Call

aten = torch.ops.aten
Made = fx.Node | Sequence[fx.Node] | No


def _gather(call: Call) -> Made:
    axis, indices = call.attribute("axis", 0) % call.rank(0), call.constant(1)
    if axis == 0 and call.is_weight(0) and call.rank(1) > 0:
        return call.emit(aten.embedding.default, call.value(0), call.value(1))
    if indices is not None and indices.ndim == 0:
        return call.emit(aten.select.int, call.value(0), axis, int(indices))
    index = call.value(1)
    if call.dtype(1) != torch.int64:
        index = call.emit(aten.to.dtype, index, torch.int64)
    return call.emit(aten.index.Tensor, call.value(0), [None] * axis + [index])


def _reshape(call: Call) -> Made:
    sizes = call.sizes(1)
    if sizes is None:
        return No("its shape is computed from data")
    if not call.attribute("allowzero", 0):
        sizes = [call.size(0, i) if isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)]
    return call.emit(aten.reshape.default, call.value(0), sizes)


def _expand(call: Call) -> Made:
    sizes, shape = call.sizes(1), call.shape(0)
    if sizes is None or shape is None:
        return No("its shape is computed from data")
    if len(shape) <= len(sizes) and all(
        have == 1 or have == want for have, want in zip(reversed(shape), reversed(sizes), strict=False)
    ):
        return call.emit(aten.expand.default, call.value(0), sizes)
    # Both sides may be the one that grows: that is broadcasting against a tensor of that shape.
    like = call.emit(aten.zeros.default, sizes)
    return call.item(call.emit(aten.broadcast_tensors.default, [call.value(0), like]), 0)


def _gather_elements(call: Call) -> Made:
    axis = call.attribute("axis", 0) % call.rank(0)
    index = call.emit(aten.remainder.Scalar, call.value(1), call.size(0, axis))  # negative ones count from the end
    return call.emit(aten.gather.default, call.value(0), axis, index)


def _transpose(call: Call) -> Made:
    order = call.attribute("perm", list(range(call.rank(0)))[::-1])
    return call.emit(aten.permute.default, call.value(0), order)


def _concat(call: Call) -> Made:
    return call.emit(aten.cat.default, list(call.inputs), call.attribute("axis", 1))


def _flatten(call: Call) -> Made:
    axis = call.attribute("axis", 1)
    axis = axis + call.rank(0) if axis < 0 else axis
    front: Any = 1
    for i in range(axis):
        size = call.size(0, i)
        whole = isinstance(front, int) and isinstance(size, int)
        front = size if i == 0 else front * size if whole else call.emit(operator.mul, front, size)
    back = [call.builder.types[call.name(0)].shape[i] for i in range(axis, call.rank(0))]
    known = math.prod(back) if all(isinstance(size, int) for size in back) else -1
    return call.emit(aten.reshape.default, call.value(0), [front, known])


def _squeeze(call: Call) -> Made:
    axes = call.listed("axes", 1, since=13)
    if axes is None and call.proto.input[1:]:
        return No("its axes are computed")
    return call.emit(aten.squeeze.dims, call.value(0), axes) if axes is not None else No("it squeezes every axis of 1")


def _unsqueeze(call: Call) -> Made:
    axes = call.listed("axes", 1, since=13)
    if axes is None:
        return No("its axes are computed")
    value, rank = call.inputs[0], call.rank(0) + len(axes)
    for axis in sorted(a % rank for a in axes):
        value = call.emit(aten.unsqueeze.default, value, axis)
    return value


def _slice(call: Call) -> Made:
    modern = call.opset >= 10
    starts, ends = (
        call.sizes(i) if modern else call.listed(name, i, since=10) for i, name in ((1, "starts"), (2, "ends"))
    )
    axes, steps = call.listed("axes", 3, since=10), call.listed("steps", 4, since=10)
    computed = modern and ((call.has(3) and axes is None) or (call.has(4) and steps is None))
    if starts is None or ends is None or computed:
        return No("its bounds are computed")
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    if any(step < 1 for step in steps):
        return No("it steps backwards")
    value, most = call.inputs[0], 2**63 - 1
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        value = call.emit(
            aten.slice.Tensor, value, axis % call.rank(0), start, min(end, most) if isinstance(end, int) else end, step
        )
    return value


def _split(call: Call) -> Made:
    axis = call.attribute("axis", 0) % call.rank(0)
    sizes = call.listed("split", 1, since=13)
    if sizes is None:
        whole, count = call.size(0, axis), len(call.proto.output)
        if call.has(1) or not isinstance(whole, int):
            return No("its sizes are computed")
        each = -(-whole // count)
        sizes = [min(each, whole - i * each) for i in range(count)]
    pieces = call.emit(aten.split_with_sizes.default, call.value(0), sizes, axis)
    return [call.item(pieces, i) for i in range(len(sizes))]


def _cast(call: Call) -> Made:
    dtype, source = DTYPES.get(call.attribute("to", 1)), call.dtype(0)
    if dtype is None or (source.is_floating_point and not dtype.is_floating_point and dtype != torch.bool):
        return No("floats to integers are undefined outside their range")
    return call.emit(aten.to.dtype, call.value(0), dtype)


def _cast_like(call: Call) -> Made:
    source, dtype = call.dtype(0), call.dtype(1)
    if source.is_floating_point and not dtype.is_floating_point and dtype != torch.bool:
        return No("floats to integers are undefined outside their range")
    return call.emit(aten.to.dtype, call.value(0), dtype)


def _range(call: Call) -> Made:
    bounds = [call.sizes(i) for i in range(3)]
    if any(b is None for b in bounds) or call.dtype(0) != torch.int64:
        return No("its bounds are computed from data")
    start, stop, step = (b[0] for b in bounds if b is not None)
    return call.emit(aten.arange.start_step, start, stop, step, dtype=torch.int64)


def _pad(call: Call) -> Made:
    pads = call.listed("pads", 1, since=11)
    fill = call.attribute("value", 0.0) if call.opset < 11 else call.constant(2) if call.has(2) else 0.0
    if pads is None or fill is None or call.has(3) or call.attribute("mode", "constant") != "constant":
        return No("its pads are computed, or it is not padded by a constant")
    rank = call.rank(0)
    pairs = [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])]
    return call.emit(aten.constant_pad_nd.default, call.value(0), pairs, float(fill))


def _shape(call: Call) -> Made:
    start, end, _ = slice(call.attribute("start", 0), call.attribute("end", None)).indices(call.rank(0))
    whole = call.emit(aten._shape_as_tensor.default, call.value(0))
    return whole if (start, end) == (0, call.rank(0)) else call.emit(aten.slice.Tensor, whole, 0, start, end)


def _constant_of_shape(call: Call) -> Made:
    sizes, value = call.sizes(0), call.tensor_attribute("value")
    if sizes is None or (value is not None and value.dtype not in DTYPES.values()):
        return No("its shape is computed from data")
    fill = 0.0 if value is None else value.item()
    return call.emit(aten.full.default, sizes, fill, dtype=torch.float32 if value is None else value.dtype)


def _trilu(call: Call) -> Made:
    k = call.constant(1)
    if call.has(1) and k is None:
        return No("its diagonal is computed")
    target = aten.triu.default if call.attribute("upper", 1) else aten.tril.default
    return call.emit(target, call.value(0), 0 if k is None else int(k))


def _cumsum(call: Call) -> Made:
    axis = call.constant(1)
    if axis is None or call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        return No("its axis is computed, or it runs backwards")
    return call.emit(aten.cumsum.default, call.value(0), int(axis), dtype=call.dtype(0))


VIEWS: dict[str, Callable[[Call], Made]] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Reshape": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Concat": _concat,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Split": _split,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Range": _range,
    "Pad": _pad,
    "Shape": _shape,
    "ConstantOfShape": _constant_of_shape,
    "Trilu": _trilu,
    "CumSum": _cumsum,
}
