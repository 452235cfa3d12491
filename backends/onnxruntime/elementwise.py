"""Rules for operators that work element by element, and for arithmetic on sizes."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from qcompiler.backends.onnxruntime.graph import dtype_of
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, Unsupported
from qcompiler.program import Type


def unary(kind: str, **attributes: Any) -> Rule:
    """The ONNX operator of that name, on the result's dtype."""

    def rule(low: Lowering, out: Type, x: ir.Value, *rest: Any) -> ir.Value:
        return low.op(kind, low.cast(x, out.dtype), **attributes)

    return rule


def binary(kind: str) -> Rule:
    """The ONNX operator of that name, on the result's dtype."""

    def rule(low: Lowering, out: Type | None, a: Any, b: Any, *rest: Any) -> ir.Value:
        dtype = out.dtype if out else torch.int64
        return low.op(kind, low.cast(a, dtype), low.cast(b, dtype))

    return rule


def scaled(kind: str) -> Rule:
    """a + alpha * b, a - alpha * b."""

    def rule(low: Lowering, out: Type | None, a: Any, b: Any, alpha: Any = 1) -> ir.Value:
        dtype = out.dtype if out else torch.int64
        second = low.cast(b, dtype)
        if alpha != 1:
            second = low.op("Mul", second, low.cast(alpha, dtype))
        return low.op(kind, low.cast(a, dtype), second)

    return rule


def comparison(kind: str, negate: bool = False) -> Rule:
    """The ONNX comparison of that name, on the dtype both sides promote to."""

    def rule(low: Lowering, out: Type, a: Any, b: Any) -> ir.Value:
        dtype = promoted(a, b)
        if dtype == torch.bool and kind != "Equal":
            dtype = torch.int32
        found = low.op(kind, low.cast(a, dtype), low.cast(b, dtype))
        return low.op("Not", found) if negate else found

    return rule


def promoted(a: Any, b: Any) -> torch.dtype:
    """The dtype that two operands meet in."""
    return torch.result_type(*(torch.empty((1,), dtype=dtype_of(x)) if isinstance(x, ir.Value) else x for x in (a, b)))


def logical(kind: str) -> Rule:
    """A logical operator on truth values."""

    def rule(low: Lowering, out: Type, *operands: Any) -> ir.Value:
        return low.op(kind, *(low.cast(x, torch.bool) for x in operands))

    return rule


def bitwise(kind: str) -> Rule:
    """A bitwise operator, on bits or on truth values."""

    def rule(low: Lowering, out: Type, *operands: Any) -> ir.Value:
        plain = {"And": "And", "Or": "Or", "Xor": "Xor", "Not": "Not"}[kind]
        name = plain if out.dtype == torch.bool else f"Bitwise{kind}"
        return low.op(name, *(low.cast(x, out.dtype) for x in operands))

    return rule


def rsub(low: Lowering, out: Type, a: Any, b: Any, alpha: Any = 1) -> ir.Value:
    """b - alpha * a."""
    difference: ir.Value = scaled("Sub")(low, out, b, a, alpha)
    return difference


def divide(low: Lowering, out: Type, a: Any, b: Any, rounding: str | None = None) -> ir.Value:
    """True division, or rounded towards zero or down."""
    if rounding == "floor":
        return floor_divide(low, out, a, b)
    quotient = low.op("Div", low.cast(a, out.dtype), low.cast(b, out.dtype))
    if rounding != "trunc" or not out.dtype.is_floating_point:
        return quotient
    return low.op("Mul", low.op("Sign", quotient), low.op("Floor", low.op("Abs", quotient)))


def floor_divide(low: Lowering, out: Type | None, a: Any, b: Any) -> ir.Value:
    """Division rounded down, also for negative integers (which ONNX rounds towards zero)."""
    dtype = out.dtype if out else torch.int64
    a, b = low.cast(a, dtype), low.cast(b, dtype)
    if dtype.is_floating_point:
        return low.op("Floor", low.op("Div", a, b))
    return low.op("Div", low.op("Sub", a, low.op("Mod", a, b)), b)


def remainder(low: Lowering, out: Type | None, a: Any, b: Any) -> ir.Value:
    """a modulo b, with the sign of b."""
    dtype = out.dtype if out else torch.int64
    a, b = low.cast(a, dtype), low.cast(b, dtype)
    if not dtype.is_floating_point:
        return low.op("Mod", a, b)
    return low.op("Sub", a, low.op("Mul", low.op("Floor", low.op("Div", a, b)), b))


def power(low: Lowering, out: Type, a: Any, b: Any) -> ir.Value:
    """a ** b; squares and square roots without a power."""
    a = low.cast(a, out.dtype)
    if b == 2:
        return low.op("Mul", a, a)
    if b == 0.5:
        return low.op("Sqrt", a)
    if b == -0.5:
        return low.op("Reciprocal", low.op("Sqrt", a))
    return low.op("Pow", a, low.cast(b, out.dtype))


def reciprocal_root(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """1 / sqrt(x)."""
    return low.op("Reciprocal", low.op("Sqrt", low.cast(x, out.dtype)))


def silu(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """x * sigmoid(x), which ONNX Runtime has as QuickGelu with alpha 1."""
    if low.options.opset_only:
        return low.op("Mul", x, low.op("Sigmoid", x))
    return low.contrib("QuickGelu", x, alpha=1.0)  # type: ignore[no-any-return]


def gelu(low: Lowering, out: Type, x: ir.Value, approximate: str = "none") -> ir.Value:
    """Gaussian error linear unit, exact or by tanh."""
    return low.op("Gelu", x, approximate=approximate)


def clamp(low: Lowering, out: Type, x: ir.Value, low_end: Any = None, high_end: Any = None) -> ir.Value:
    """Limited from below and above."""
    ends = [None if end is None else low.cast(end, out.dtype) for end in (low_end, high_end)]
    return low.op("Clip", low.cast(x, out.dtype), *ends)


def clamp_low(low: Lowering, out: Type, x: ir.Value, end: Any) -> ir.Value:
    """Limited from below."""
    return clamp(low, out, x, end)


def clamp_high(low: Lowering, out: Type, x: ir.Value, end: Any) -> ir.Value:
    """Limited from above."""
    return clamp(low, out, x, None, end)


def hardtanh(low: Lowering, out: Type, x: ir.Value, low_end: float = -1.0, high_end: float = 1.0) -> ir.Value:
    """Limited to an interval."""
    return clamp(low, out, x, low_end, high_end)


def softplus(low: Lowering, out: Type, x: ir.Value, beta: float = 1, threshold: float = 20) -> ir.Value:
    """log(1 + exp(beta x)) / beta."""
    if beta == 1:
        return low.op("Softplus", x)
    return low.op("Div", low.op("Softplus", low.op("Mul", x, low.cast(beta, out.dtype))), low.cast(beta, out.dtype))


def leaky(low: Lowering, out: Type, x: ir.Value, slope: float = 0.01) -> ir.Value:
    """Leaky rectified linear unit."""
    return low.op("LeakyRelu", x, alpha=float(slope))


def log1p(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """log(1 + x)."""
    return low.op("Log", low.op("Add", low.cast(x, out.dtype), low.cast(1, out.dtype)))


def expm1(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """exp(x) - 1."""
    return low.op("Sub", low.op("Exp", low.cast(x, out.dtype)), low.cast(1, out.dtype))


def relu6(low: Lowering, out: Type, x: ir.Value) -> ir.Value:
    """Limited to 0 .. 6."""
    return clamp(low, out, x, 0, 6)


def where(low: Lowering, out: Type, condition: ir.Value, a: Any, b: Any) -> ir.Value:
    """a where the condition holds, else b."""
    return low.op("Where", low.cast(condition, torch.bool), low.cast(a, out.dtype), low.cast(b, out.dtype))


def masked_fill(low: Lowering, out: Type, x: ir.Value, mask: ir.Value, value: Any) -> ir.Value:
    """x, but `value` where the mask holds."""
    return where(low, out, mask, value, x)


def cast_to(low: Lowering, out: Type, x: ir.Value, *rest: Any) -> ir.Value:
    """The same values in the result's dtype."""
    return low.cast(x, out.dtype)


def same(low: Lowering, out: Any, x: Any, *rest: Any) -> Any:
    """The argument itself."""
    return x


def dropout(low: Lowering, out: Any, x: Any, p: float = 0.0, train: bool = False) -> Any:
    """Nothing, outside training."""
    if train and p:
        raise Unsupported("dropout in training mode; capture the model in evaluation mode")
    return x


def number(kind: Callable[[float], float] | str) -> Rule:
    """Arithmetic on sizes."""

    def rule(low: Lowering, out: Any, *operands: Any) -> ir.Value:
        return low.op(str(kind), *(low.cast(x, torch.int64) for x in operands))

    return rule


RULES: dict[str, Rule] = {
    **{
        f"aten.{name}": unary(kind)
        for name, kind in {
            "abs": "Abs",
            "neg": "Neg",
            "exp": "Exp",
            "log": "Log",
            "sqrt": "Sqrt",
            "reciprocal": "Reciprocal",
            "sin": "Sin",
            "cos": "Cos",
            "tan": "Tan",
            "tanh": "Tanh",
            "asin": "Asin",
            "acos": "Acos",
            "atan": "Atan",
            "sinh": "Sinh",
            "cosh": "Cosh",
            "asinh": "Asinh",
            "acosh": "Acosh",
            "atanh": "Atanh",
            "sigmoid": "Sigmoid",
            "relu": "Relu",
            "erf": "Erf",
            "floor": "Floor",
            "ceil": "Ceil",
            "round": "Round",
            "sign": "Sign",
            "mish": "Mish",
            "hardswish": "HardSwish",
            "softsign": "Softsign",
        }.items()
    },
    "aten.hardsigmoid": unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "aten.isnan": lambda low, out, x: low.op("IsNaN", x),
    "aten.isinf": lambda low, out, x: low.op("IsInf", x),
    "aten.add": scaled("Add"),
    "aten.sub": scaled("Sub"),
    "aten.rsub": rsub,
    "aten.mul": binary("Mul"),
    "aten.div": divide,
    "aten.true_divide": divide,
    "aten.floor_divide": floor_divide,
    "aten.remainder": remainder,
    "aten.fmod": lambda low, out, x, y: low.op("Mod", x, low.cast(y, out.dtype), fmod=1),
    "aten.maximum": binary("Max"),
    "aten.minimum": binary("Min"),
    "aten.pow": power,
    "aten.square": lambda low, out, x: power(low, out, x, 2),
    "aten.rsqrt": reciprocal_root,
    "aten.log1p": log1p,
    "aten.expm1": expm1,
    "aten.eq": comparison("Equal"),
    "aten.ne": comparison("Equal", negate=True),
    "aten.lt": comparison("Less"),
    "aten.le": comparison("LessOrEqual"),
    "aten.gt": comparison("Greater"),
    "aten.ge": comparison("GreaterOrEqual"),
    "aten.logical_and": logical("And"),
    "aten.logical_or": logical("Or"),
    "aten.logical_xor": logical("Xor"),
    "aten.logical_not": logical("Not"),
    "aten.bitwise_and": bitwise("And"),
    "aten.bitwise_or": bitwise("Or"),
    "aten.bitwise_xor": bitwise("Xor"),
    "aten.bitwise_not": bitwise("Not"),
    "aten.__and__": bitwise("And"),
    "aten.__or__": bitwise("Or"),
    "aten.__xor__": bitwise("Xor"),
    "aten.silu": silu,
    "aten.gelu": gelu,
    "aten.clamp": clamp,
    "aten.clip": clamp,
    "aten.clamp_min": clamp_low,
    "aten.clamp_max": clamp_high,
    "aten.hardtanh": hardtanh,
    "aten.relu6": relu6,
    "aten.softplus": softplus,
    "aten.leaky_relu": leaky,
    "aten.elu": lambda low, out, x, alpha=1.0, *rest: low.op("Elu", x, alpha=alpha),
    "aten.where": where,
    "aten.masked_fill": masked_fill,
    **dict.fromkeys(
        ["aten._to_copy", "aten.to", "aten.type_as", "aten.float", "aten.int", "aten.long", "aten.bool"], cast_to
    ),
    **dict.fromkeys(
        [
            f"aten.{name}"
            for name in [
                "alias",
                "clone",
                "contiguous",
                "detach",
                "detach_",
                "lift_fresh",
                "lift_fresh_copy",
                "positive",
            ]
        ],
        same,
    ),
    "aten.dropout": dropout,
    "aten._assert_tensor_metadata": same,
    "operator.add": number("Add"),
    "operator.sub": number("Sub"),
    "operator.mul": number("Mul"),
    "operator.floordiv": floor_divide,
    "operator.mod": remainder,
    "operator.neg": number("Neg"),
    "operator.getitem": lambda low, out, values, index: values[index],
    "torch.sym_max": number("Max"),
    "torch.sym_min": number("Min"),
}
