"""Which ATen operators an ONNX operator becomes. Each rule is exactly right or says No; nothing is approximated.

Those that only move or select elements are in `onnx_views`. Rules are checked on data for every node when a model is
captured (see `onnx`): a rule that errs costs an opaque node, never a wrong program.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.frontends.onnx_graph import Call
from qcompiler.frontends.onnx_views import VIEWS, Made

aten = torch.ops.aten


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
            return (
                integers(call) if not isinstance(integers, torch._ops.OpOverload) else call.emit(integers, *call.inputs)
            )
        return call.emit(target, *call.operands(swap=target in _COMMUTE))

    return rule


_COMMUTE = (aten.add.Tensor, aten.mul.Tensor)


def _compare(target: Any) -> Callable[[Call], Made]:
    """A comparison, of tensors only."""

    def rule(call: Call) -> Made:
        return call.emit(target, *call.inputs) if call.opset >= 7 else No("broadcasting before opset 7")

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
    base, exponent = call.operands()
    if isinstance(exponent, fx.Node):
        return _binary(aten.pow.Tensor_Tensor)(call)
    return call.emit(aten.pow.Tensor_Scalar, base, int(exponent) if exponent == int(exponent) else exponent)


def _mod(call: Call) -> Made:
    return call.emit(aten.fmod.Tensor if call.attribute("fmod", 0) else aten.remainder.Tensor, *call.inputs)


def _gelu(call: Call) -> Made:
    return call.emit(aten.gelu.default, call.value(0), approximate=call.attribute("approximate", "none"))


def _clip(call: Call) -> Made:
    if call.opset < 11:
        return call.emit(aten.clamp.default, call.value(0), call.attribute("min", None), call.attribute("max", None))
    known = [call.number(i) for i in (1, 2)]
    if all(number is not None or not call.has(i) for i, number in zip((1, 2), known, strict=True)):
        return call.emit(aten.clamp.default, call.value(0), *known) if known != [None, None] else call.inputs[0]
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
    return call.inputs[0]


def _identity(call: Call) -> Made:
    return call.inputs[0]


def _leaky(call: Call) -> Made:
    return call.emit(aten.leaky_relu.default, call.value(0), call.attribute("alpha", 0.01))


def _swish(call: Call) -> Made:
    if call.attribute("alpha", 1.0) != 1.0:
        return No("alpha is not 1")
    return call.emit(aten.silu.default, call.value(0))


def _einsum(call: Call) -> Made:
    return call.emit(aten.einsum.default, call.attribute("equation", ""), list(call.inputs))


RULES: dict[str, Callable[[Call], Made]] = {
    **VIEWS,
    **{
        name: _simple(target)
        for name, target in {
            "Relu": aten.relu.default,
            "Sigmoid": aten.sigmoid.default,
            "Tanh": aten.tanh.default,
            "Erf": aten.erf.default,
            "Exp": aten.exp.default,
            "Log": aten.log.default,
            "Sqrt": aten.sqrt.default,
            "Neg": aten.neg.default,
            "Abs": aten.abs.default,
            "Floor": aten.floor.default,
            "Ceil": aten.ceil.default,
            "Round": aten.round.default,
            "Sin": aten.sin.default,
            "Cos": aten.cos.default,
            "Tan": aten.tan.default,
            "Asin": aten.asin.default,
            "Acos": aten.acos.default,
            "Atan": aten.atan.default,
            "Sinh": aten.sinh.default,
            "Cosh": aten.cosh.default,
            "Asinh": aten.asinh.default,
            "Acosh": aten.acosh.default,
            "Atanh": aten.atanh.default,
            "Reciprocal": aten.reciprocal.default,
            "Sign": aten.sign.default,
            "IsNaN": aten.isnan.default,
            "Not": aten.logical_not.default,
            "Softplus": aten.softplus.default,
            "Mish": aten.mish.default,
            "HardSwish": aten.hardswish.default,
            "And": aten.logical_and.default,
            "Or": aten.logical_or.default,
            "Xor": aten.logical_xor.default,
            "Where": aten.where.self,
        }.items()
    },
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
    "Equal": _compare(aten.eq.Tensor),
    "Less": _compare(aten.lt.Tensor),
    "LessOrEqual": _compare(aten.le.Tensor),
    "Greater": _compare(aten.gt.Tensor),
    "GreaterOrEqual": _compare(aten.ge.Tensor),
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
}


def _matmul_nbits(call: Call) -> Made:
    weight = call.matrix()
    if isinstance(weight, No):
        return weight
    return call.emit(aten.linear.default, call.value(0), weight, *([call.value(5)] if call.has(5) else []))


def _gather_quantized(call: Call) -> Made:
    weight = call.matrix()
    return weight if isinstance(weight, No) else call.emit(aten.embedding.default, weight, call.value(1))


# ONNX Runtime's own operators, of the domain com.microsoft.
CONTRIB_RULES: dict[str, Callable[[Call], Made]] = {
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_quantized,
}
