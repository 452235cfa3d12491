"""Triton's interpreter, made right: kernels run on tensors in main memory, exactly as they were written for a GPU.

`TRITON_INTERPRET=1` is read when a function is decorated, Triton's own among them, so that it must be set before
Triton is imported at all: conftest.py does that for every test process. Kernels that are to be compiled are compiled
in a process of their own.

What is put right, for Triton 3.6 to 3.9: bfloat16 is kept as its bits, and arithmetic on it works on those bits as if
they were integers; conversions to bfloat16 cut off instead of rounding; an FMA may round twice; inline
assembly is refused; the bounds of a range must be zero-dimensional for new versions of NumPy. Inline assembly is
looked up in `ASSEMBLY`: the text, and what it does to each element.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

ASSEMBLY: dict[str, Callable[..., np.ndarray]] = {}
NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def bits_to_floats(bits: np.ndarray, dtype: Any) -> np.ndarray:
    """float32 values of numbers that the interpreter keeps as their bits."""
    tensor = torch.from_numpy(np.ascontiguousarray(bits)).view(NARROW[dtype])
    return tensor.float().numpy()


def floats_to_bits(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The bits of float values, rounded to the nearest number of `dtype`."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).float().to(NARROW[dtype])
    return rounded.view(torch.uint16 if dtype == tl.bfloat16 else torch.uint8).numpy()


def widen(value: Any) -> Any:
    """A handle in float32 where it was in a dtype that NumPy does not know; anything else as it is."""
    if not isinstance(value, TensorHandle) or value.dtype.scalar not in NARROW:
        return value
    return TensorHandle(bits_to_floats(value.data, value.dtype.scalar), tl.float32)


def convert(handle: TensorHandle, dtype: Any) -> TensorHandle:
    """A handle's numbers in another dtype, rounded to the nearest."""
    wide, dtype = widen(handle), dtype.scalar
    if dtype in NARROW:
        return TensorHandle(floats_to_bits(wide.data, dtype), dtype)
    return TensorHandle(wide.data.astype(interpreter._get_np_dtype(dtype)), dtype)


def in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The method of a builder, computing in float32 what comes in narrower, and rounding once."""

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Any) -> TensorHandle:
        narrow = [a.dtype.scalar for a in arguments if isinstance(a, TensorHandle) and a.dtype.scalar in NARROW]
        result = method(self, *map(widen, arguments))
        compared = result.data.dtype == np.bool_
        return result if compared or not narrow else convert(result, narrow[0])

    return wrapped


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float64, where the product of two narrower numbers is exact."""
    return x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)


def exact_fma(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def wrapped(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.dtype.scalar not in (tl.float16, tl.bfloat16, tl.float32):
            return original(self, x, y, z)
        return convert(TensorHandle(fma(widen(x).data, widen(y).data, widen(z).data), tl.float64), z.dtype)

    return wrapped


def dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Products of narrow numbers are exact in the float32 that they are added up in."""

    def wrapped(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, widen(a), widen(b), d, *rest)

    return wrapped


def cast(self: Any, handle: TensorHandle, dtype: Any, *_: Any) -> TensorHandle:
    return convert(handle, dtype)


def summed(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, values: Any) -> Any:
        if values.dtype not in NARROW:
            return original(self, values)
        whole = original(self, tl.core.tensor(widen(values.handle), tl.block_type(tl.float32, values.shape)))
        return tl.core.tensor(convert(whole.handle, values.dtype), whole.type.with_element_ty(values.dtype))

    return wrapped


class AssemblyResult:
    """What the call of an inline assembly gives: its results by number."""

    def __init__(self, *results: TensorHandle) -> None:
        self.results = results

    def get_result(self, index: int) -> TensorHandle:
        return self.results[index]


def inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, *_: Any) -> AssemblyResult:
    """Look the text up; it works on the bits of each element."""
    [dtype] = [dtype.scalar for dtype in types]
    outcome = ASSEMBLY[text](*(value.data for value in values))
    return AssemblyResult(TensorHandle(outcome.view(interpreter._get_np_dtype(dtype)), dtype))


def unpack_f16(words: Any, shift: Any, mask: Any, multiplier: Any, addend: Any) -> np.ndarray:
    code = words.view(np.uint16) >> shift.view(np.uint16) & mask.view(np.uint16)
    return fma(code.view(np.float16), multiplier, addend).astype(np.float16)


def unpack_bf16(words: Any, shift: Any, mask: Any, multiplier: Any, addend: Any) -> np.ndarray:
    code = words.view(np.uint16) >> shift.view(np.uint16) & mask.view(np.uint16)
    values = [bits_to_floats(part.view(np.uint16), tl.bfloat16) for part in (code, multiplier, addend)]
    return floats_to_bits(fma(*values), tl.bfloat16)


def center_f16(words: Any, shift: Any, mask: Any, multiplier: Any, addend: Any) -> np.ndarray:
    centered = unpack_f16(words, shift, mask, np.ones_like(multiplier), addend)
    return (centered.astype(np.float64) * multiplier.astype(np.float64)).astype(np.float16)


def center_bf16(words: Any, shift: Any, mask: Any, multiplier: Any, addend: Any) -> np.ndarray:
    one = floats_to_bits(np.ones(multiplier.shape, np.float32), tl.bfloat16)
    centered = bits_to_floats(unpack_bf16(words, shift, mask, one, addend), tl.bfloat16)
    return floats_to_bits(centered * bits_to_floats(multiplier.view(np.uint16), tl.bfloat16), tl.bfloat16)


def take_top(collected: Any, words: Any) -> np.ndarray:
    return collected.view(np.uint16) << 1 | words.view(np.uint16) >> 15


def join_six(low: Any, high: Any, shift: int) -> np.ndarray:
    return low.view(np.uint16) >> np.uint16(12) | high.view(np.uint16) >> np.uint16(shift) & np.uint16(0x30)


def decode_f16(words: Any, shift: Any, raised: Any, taken: Any, steps: Any) -> np.ndarray:
    codes = words.view(np.uint32) >> shift.view(np.uint32) & 0x00FF00FF | raised.view(np.uint32)
    values = codes.view(np.float16) + taken.view(np.float16)
    return (values * steps.view(np.float16)).view(np.int32)


def decode_bf16(words: Any, shift: Any, raised: Any, taken: Any, steps: Any) -> np.ndarray:
    codes = words.view(np.uint32) >> shift.view(np.uint32) & 0x00FF00FF
    parts = (bits_to_floats(part.view(np.uint16), tl.bfloat16) for part in (codes, raised, taken, steps))
    code, up, down, step = parts
    values = bits_to_floats(floats_to_bits(fma(code, up, down), tl.bfloat16), tl.bfloat16)
    return floats_to_bits(values * step, tl.bfloat16).view(np.int32)


def pick(words: Any, places: Any) -> np.ndarray:
    """PRMT of words and zeros, by four numbers of four bits each."""
    zeros = np.zeros_like(words)
    bytes_ = [picked(words, zeros, places >> 4 * i & 15).astype(np.uint32) << np.uint32(8 * i) for i in range(4)]
    return (bytes_[0] | bytes_[1] | bytes_[2] | bytes_[3]).view(np.int32)


def picked(first: Any, second: Any, place: Any) -> np.ndarray:
    """What PRMT picks by the four bits of `place` from the bytes of two words: a byte, or its sign eight times."""
    word = np.where(place & 4, second, first).view(np.uint32)
    byte = word >> (8 * (place & 3)).astype(np.uint32) & 255
    return np.where(place & 8, np.where(byte > 127, 255, 0), byte).astype(np.uint16)


def looked_up(words: Any, plane: int, tables: Any) -> np.ndarray:
    """The 16-bit entries of a plane of places: what kernels/codebook.py's assembly picks."""
    place = words.view(np.uint16) >> np.uint16(4 * plane) & np.uint16(15)
    halves = [
        picked(*tables[half : half + 2], place) ^ picked(*tables[half + 2 : half + 4], place ^ 8) for half in (0, 4)
    ]
    return halves[0] | halves[1] << np.uint16(8)


def look_up_f16(words: Any, multiplier: Any, *tables: Any, plane: int) -> np.ndarray:
    return looked_up(words, plane, tables).view(np.float16) * multiplier


def look_up_bf16(words: Any, multiplier: Any, *tables: Any, plane: int) -> np.ndarray:
    entries = bits_to_floats(looked_up(words, plane, tables), tl.bfloat16)
    return floats_to_bits(entries * bits_to_floats(multiplier, tl.bfloat16), tl.bfloat16)


def with_item(original: Callable[..., None]) -> Callable[..., None]:
    def wrapped(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return wrapped


def install() -> None:
    """Patch the interpreter, once."""
    from qcompiler.kernels import codebook, linear_a8, linear_float8, linear_gguf, planes

    builder = InterpreterBuilder
    if builder.create_inline_asm is inline_asm:
        return
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, in_float32(getattr(builder, name)))
    builder.create_fma = exact_fma(builder.create_fma)
    builder.create_dot = dot(builder.create_dot)
    builder.cast_impl = cast
    builder.create_fp_to_fp = cast
    builder.get_bf16 = lambda self, value: convert(self.get_fp32(value), tl.bfloat16)
    builder.create_inline_asm = inline_asm
    ReduceOps.sum = summed(ReduceOps.sum)
    interpreter._patch_lang_tensor = with_item(interpreter._patch_lang_tensor)
    ASSEMBLY[planes.UNPACK_F16.value] = unpack_f16
    ASSEMBLY[planes.UNPACK_BF16.value] = unpack_bf16
    ASSEMBLY[planes.CENTER_F16.value] = center_f16
    ASSEMBLY[planes.CENTER_BF16.value] = center_bf16
    for plane in range(4):
        ASSEMBLY[codebook.LOOK_UP_F16.value[plane]] = functools.partial(look_up_f16, plane=plane)
        ASSEMBLY[codebook.LOOK_UP_BF16.value[plane]] = functools.partial(look_up_bf16, plane=plane)
    ASSEMBLY[planes.JOIN_12.value] = functools.partial(join_six, shift=8)
    ASSEMBLY[planes.JOIN_14.value] = functools.partial(join_six, shift=10)
    ASSEMBLY[linear_gguf.DECODE_F16.value] = decode_f16
    ASSEMBLY[linear_gguf.DECODE_BF16.value] = decode_bf16
    ASSEMBLY[codebook.SPREAD.value] = lambda word: word
    ASSEMBLY[linear_a8.HIGH.value] = lambda words: words & np.int8(-16)
    ASSEMBLY[linear_a8.LOW.value] = lambda words: words << 4
    ASSEMBLY[planes.TAKE_TOP.value] = take_top
    ASSEMBLY[linear_float8.LOW.value] = lambda words: words & np.int8(15)
    ASSEMBLY[linear_float8.HIGH.value] = lambda words: words >> 4 & np.int8(15)
    ASSEMBLY[planes.PICK.value] = pick
