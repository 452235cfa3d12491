"""Which ATen operators an ONNX operator becomes. Each rule is exactly right or says No; nothing is approximated.

Rules are checked on data for every node when a model is captured (see `onnx`): a rule that errs costs an opaque
node, never a wrong program.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.frontends.onnx_graph import Call
from qcompiler.frontends.onnx_model import DTYPES

aten = torch.ops.aten
Made = fx.Node | Sequence[fx.Node] | No


def _simple(target: Any, *names: str, opset: int = 1, **defaults: Any) -> Callable[[Call], Made]:
    """All inputs in order, then the named attributes (each with its default) as further arguments."""

    def rule(call: Call) -> Made:
        if call.opset < opset:
            return No(f"opset {call.opset} gives {call.op} another meaning")
        return call.emit(target, *call.inputs, *(call.attribute(name, defaults[name]) for name in names))

    return rule


def _binary(target: Any, integers: Any = None) -> Callable[[Call], Made]:
    """Two inputs with multidirectional broadcasting; `integers` is the operator for integer inputs."""

    def rule(call: Call) -> Made:
        if call.opset < 7:
            return No("broadcasting before opset 7")
        if integers is not None and not call.dtype(0).is_floating_point:
            return integers(call) if not isinstance(integers, torch._ops.OpOverload) else call.emit(integers, *call.inputs)
        return call.emit(target, *call.inputs)

    return rule


def _many(target: Any) -> Callable[[Call], Made]:
    """A fold over any number of inputs."""

    def rule(call: Call) -> Made:
        first, *rest = call.inputs
        if call.opset < 8 and rest:
            return No("broadcasting before opset 8")
        for value in rest:
            first = call.emit(target, first, value)
        return first

    return rule


def _int_div(call: Call) -> Made:
    return call.emit(aten.div.Tensor_mode, *call.inputs, rounding_mode="trunc")


def _pow(call: Call) -> Made:
    if call.dtype(0) != call.dtype(1):
        return No("base and exponent of different types")
    return _binary(aten.pow.Tensor_Tensor)(call)


def _mod(call: Call) -> Made:
    return call.emit(aten.fmod.Tensor if call.attribute("fmod", 0) else aten.remainder.Tensor, *call.inputs)


def _gelu(call: Call) -> Made:
    return call.emit(aten.gelu.default, call.value(0), approximate=call.attribute("approximate", "none"))


def _clip(call: Call) -> Made:
    if call.opset < 11:
        return call.emit(aten.clamp.default, call.value(0), call.attribute("min", None), call.attribute("max", None))
    low, high = call.value(1), call.value(2)
    return call.value(0) if low is None and high is None else call.emit(aten.clamp.Tensor, call.value(0), low, high)


def _softmax(target: Any) -> Callable[[Call], Made]:
    def rule(call: Call) -> Made:
        axis = call.attribute("axis", -1 if call.opset >= 13 else 1)
        if call.opset < 13 and axis % call.rank(0) != call.rank(0) - 1:
            return No("before opset 13 the axes behind the given one are taken together")
        return call.emit(target, call.value(0), axis)

    return rule


def _layer_norm(call: Call) -> Made:
    if len(call.proto.output) > 1 or call.attribute("stash_type", 1) != 1:
        return No("its mean and deviation are used, or stored in a short type")
    axis, sizes = call.attribute("axis", -1), call.shape(1)
    if sizes is None or axis % call.rank(0) != call.rank(0) - len(sizes):
        return No("its scale does not span the normalized axes")
    eps = call.attribute("epsilon", 1e-5)
    return call.emit(aten.layer_norm.default, call.value(0), sizes, call.value(1), call.value(2), eps)


def _rms_norm(call: Call) -> Made:
    axis, sizes = call.attribute("axis", -1), call.shape(1)
    if len(call.proto.output) > 1 or sizes is None or axis % call.rank(0) != call.rank(0) - len(sizes):
        return No("its scale does not span the normalized axes")
    return call.emit(aten.rms_norm.default, call.value(0), sizes, call.value(1), call.attribute("epsilon", 1e-5))


def _batch_norm(call: Call) -> Made:
    if len(call.proto.output) > 1 or call.attribute("training_mode", 0) or call.opset < 9:
        return No("it trains, or is older than opset 9")
    x, weight, bias, mean, variance = (call.value(i) for i in range(5))
    eps = call.attribute("epsilon", 1e-5)
    return call.emit(aten.batch_norm.default, x, weight, bias, mean, variance, False, 0.0, eps, False)


def _matmul(call: Call) -> Made:
    weight = call.weight(1)
    if weight is not None:
        return call.emit(aten.linear.default, call.value(0), weight)
    return call.emit(aten.matmul.default, *call.inputs)


def _gemm(call: Call) -> Made:
    plain = call.attribute("alpha", 1.0) == 1.0 and call.attribute("beta", 1.0) == 1.0
    if not plain or call.attribute("transA", 0):
        return No("it scales or transposes its operands")
    weight = call.value(1) if call.attribute("transB", 0) else call.weight(1)
    if weight is None:
        return No("its second operand is no stored weight")
    bias, shape = call.value(2), call.shape(2)
    if bias is None or (shape is not None and len(shape) == 1 and shape[0] == call.width(1)):
        return call.emit(aten.linear.default, call.value(0), weight, *([bias] if bias else []))
    return call.emit(aten.add.Tensor, call.emit(aten.linear.default, call.value(0), weight), bias)


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
    if sizes is None or shape is None or not all(isinstance(s, int) for s in shape):
        return No("its shape is computed from data")
    if not all(isinstance(s, int) for s in sizes[-len(shape) :]) and any(s != 1 for s in shape):
        return No("it broadcasts both ways with a dynamic shape")
    shape = [1] * (len(sizes) - len(shape)) + list(shape)
    sizes = [1] * (len(shape) - len(sizes)) + list(sizes)
    wanted = [have if want == 1 and isinstance(want, int) else want for have, want in zip(shape, sizes, strict=True)]
    return call.emit(aten.expand.default, call.value(0), wanted)


def _transpose(call: Call) -> Made:
    order = call.attribute("perm", list(range(call.rank(0)))[::-1])
    return call.emit(aten.permute.default, call.value(0), order)


def _concat(call: Call) -> Made:
    return call.emit(aten.cat.default, list(call.inputs), call.attribute("axis", 1))


def _flatten(call: Call) -> Made:
    axis = call.attribute("axis", 1)
    axis = axis + call.rank(0) if axis < 0 else axis
    front = 1
    for i in range(axis):
        size = call.size(0, i)
        if not isinstance(size, int) and axis > 1:
            return No("dynamic axes in front")
        front = size if axis == 1 else front * size
    return call.emit(aten.reshape.default, call.value(0), [front, -1])


def _squeeze(call: Call) -> Made:
    axes = call.listed("axes", 1, since=13)
    if axes is None and call.proto.input[1:]:
        return No("its axes are computed")
    return call.emit(aten.squeeze.dims, call.value(0), axes) if axes is not None else No("it squeezes every axis of 1")


def _unsqueeze(call: Call) -> Made:
    axes = call.listed("axes", 1, since=13)
    if axes is None:
        return No("its axes are computed")
    value, rank = call.value(0), call.rank(0) + len(axes)
    for axis in sorted(a % rank for a in axes):
        value = call.emit(aten.unsqueeze.default, value, axis)
    return value


def _slice(call: Call) -> Made:
    modern = call.opset >= 10
    parts = [call.listed(name, i, since=10) for i, name in enumerate(("starts", "ends", "axes", "steps"), 1)]
    starts, ends, axes, steps = parts
    if starts is None or ends is None or (modern and any(call.has(i) and parts[i - 1] is None for i in (3, 4))):
        return No("its bounds are computed")
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    if any(step < 1 for step in steps):
        return No("it steps backwards")
    value, most = call.value(0), 2**63 - 1
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        value = call.emit(aten.slice.Tensor, value, axis % call.rank(0), start, min(end, most), step)
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
    return No("shapes are read where they are used")


def _constant_of_shape(call: Call) -> Made:
    sizes, value = call.sizes(0), call.tensor_attribute("value")
    if sizes is None or (value is not None and value.dtype not in DTYPES.values()):
        return No("its shape is computed from data")
    fill = 0.0 if value is None else value.item()
    return call.emit(aten.full.default, sizes, fill, dtype=torch.float32 if value is None else value.dtype)


def _reduce(target: Any) -> Callable[[Call], Made]:
    since = 13 if target is aten.sum.dim_IntList else 18

    def rule(call: Call) -> Made:
        axes = call.listed("axes", 1, since=since)
        if axes is None and (call.has(1) or call.attribute("noop_with_empty_axes", 0)):
            return No("its axes are computed, or none")
        axes = axes or list(range(call.rank(0)))
        if not call.dtype(0).is_floating_point and target is not aten.amax.default and target is not aten.amin.default:
            return No("integer sums and means round in their own way")
        return call.emit(target, call.value(0), axes, bool(call.attribute("keepdims", 1)))

    return rule


def _window(call: Call, rank: int) -> tuple[list[int], list[int], list[int]] | No:
    """Strides, symmetric pads and dilations of a convolution or pooling."""
    if call.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return No("it pads by itself (auto_pad)")
    pads = call.attribute("pads", [0] * 2 * rank)
    if pads[:rank] != pads[rank:]:
        return No("its padding is not symmetric")
    return call.attribute("strides", [1] * rank), pads[:rank], call.attribute("dilations", [1] * rank)


def _conv(call: Call) -> Made:
    rank = call.rank(0) - 2
    window = _window(call, rank)
    if isinstance(window, No) or rank not in (1, 2, 3):
        return window if isinstance(window, No) else No(f"{rank} axes to convolve over")
    strides, pads, dilations = window
    target = (aten.conv1d, aten.conv2d, aten.conv3d)[rank - 1].default
    x, weight, bias = call.value(0), call.value(1), call.value(2)
    return call.emit(target, x, weight, bias, strides, pads, dilations, call.attribute("group", 1))


def _max_pool(call: Call) -> Made:
    rank = call.rank(0) - 2
    window = _window(call, rank)
    if isinstance(window, No):
        return window
    if rank not in (1, 2, 3) or call.attribute("ceil_mode", 0) or len(call.proto.output) > 1:
        return No("it rounds up, or its indices are used")
    strides, pads, dilations = window
    target = (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)[rank - 1].default
    return call.emit(target, call.value(0), call.attribute("kernel_shape", []), strides, pads, dilations)


def _average_pool(call: Call) -> Made:
    rank = call.rank(0) - 2
    window = _window(call, rank)
    if isinstance(window, No):
        return window
    strides, pads, dilations = window
    if rank not in (1, 2, 3) or call.attribute("ceil_mode", 0) or any(d != 1 for d in dilations):
        return No("it rounds up, or is dilated")
    target = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)[rank - 1]
    counted = bool(call.attribute("count_include_pad", 0))
    return call.emit(target, call.value(0), call.attribute("kernel_shape", []), strides, pads, False, counted)


def _global_pool(target: Any) -> Callable[[Call], Made]:
    return lambda call: call.emit(target, call.value(0), list(range(2, call.rank(0))), True)


def _dropout(call: Call) -> Made:
    if len(call.proto.output) > 1 or call.has(2):
        return No("its mask is used, or it trains")
    return call.value(0)


def _identity(call: Call) -> Made:
    return call.value(0)


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


def _leaky(call: Call) -> Made:
    return call.emit(aten.leaky_relu.default, call.value(0), call.attribute("alpha", 0.01))


def _swish(call: Call) -> Made:
    if call.attribute("alpha", 1.0) != 1.0:
        return No("alpha is not 1")
    return call.emit(aten.silu.default, call.value(0))


def _einsum(call: Call) -> Made:
    return call.emit(aten.einsum.default, call.attribute("equation", ""), list(call.inputs))


RULES: dict[str, Callable[[Call], Made]] = {
    **{name: _simple(target) for name, target in {
        "Relu": aten.relu.default, "Sigmoid": aten.sigmoid.default, "Tanh": aten.tanh.default,
        "Erf": aten.erf.default, "Exp": aten.exp.default, "Log": aten.log.default, "Sqrt": aten.sqrt.default,
        "Neg": aten.neg.default, "Abs": aten.abs.default, "Floor": aten.floor.default, "Ceil": aten.ceil.default,
        "Round": aten.round.default, "Sin": aten.sin.default, "Cos": aten.cos.default, "Tan": aten.tan.default,
        "Asin": aten.asin.default, "Acos": aten.acos.default, "Atan": aten.atan.default,
        "Sinh": aten.sinh.default, "Cosh": aten.cosh.default, "Asinh": aten.asinh.default,
        "Acosh": aten.acosh.default, "Atanh": aten.atanh.default, "Reciprocal": aten.reciprocal.default,
        "Sign": aten.sign.default, "IsNaN": aten.isnan.default, "Not": aten.logical_not.default,
        "Softplus": aten.softplus.default, "Mish": aten.mish.default, "HardSwish": aten.hardswish.default,
        "And": aten.logical_and.default, "Or": aten.logical_or.default, "Xor": aten.logical_xor.default,
        "Where": aten.where.self,
    }.items()},
    "Elu": _simple(aten.elu.default, "alpha", alpha=1.0),
    "LeakyRelu": _leaky,
    "Swish": _swish,
    "Gelu": _gelu,
    "Clip": _clip,
    "Add": _binary(aten.add.Tensor),
    "Sub": _binary(aten.sub.Tensor),
    "Mul": _binary(aten.mul.Tensor),
    "Div": _binary(aten.div.Tensor, _int_div),
    "Pow": _pow,
    "Mod": _mod,
    "Equal": _binary(aten.eq.Tensor),
    "Less": _binary(aten.lt.Tensor),
    "LessOrEqual": _binary(aten.le.Tensor),
    "Greater": _binary(aten.gt.Tensor),
    "GreaterOrEqual": _binary(aten.ge.Tensor),
    "Max": _many(aten.maximum.default),
    "Min": _many(aten.minimum.default),
    "Sum": _many(aten.add.Tensor),
    "Softmax": _softmax(aten.softmax.int),
    "LogSoftmax": _softmax(aten.log_softmax.int),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "BatchNormalization": _batch_norm,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Gather": _gather,
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
    "ReduceMean": _reduce(aten.mean.dim),
    "ReduceSum": _reduce(aten.sum.dim_IntList),
    "ReduceMax": _reduce(aten.amax.default),
    "ReduceMin": _reduce(aten.amin.default),
    "ReduceLogSumExp": _reduce(aten.logsumexp.default),
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool(aten.mean.dim),
    "GlobalMaxPool": _global_pool(aten.amax.default),
    "Dropout": _dropout,
    "Identity": _identity,
    "Trilu": _trilu,
    "CumSum": _cumsum,
}
