"""kv_append: new keys or values, rounded token by token and stored in a cache of 4 or 8 bits.

The codes of a token lie in planes along its channels (planes.py): it is stored without reading what is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.errors import No
from qcompiler.kernels.cost import H200, Device
from qcompiler.kernels.norm_quantize import divide
from qcompiler.kernels.packed_integers import MAGIC
from qcompiler.kernels.sass import Build
from qcompiler.scheme import Scheme
from qcompiler.target import Answer


@triton.jit
def kv_append_kernel(
    x,
    words,
    grids,
    places,
    NEW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MAGIC: tl.constexpr,
):
    """Round x [batch, KV_HEADS, NEW, D] token by token, and store it in a cache from places [batch] on.

    Program (i, j): batch and head i, new token j. The codes are those of qcompiler.rounding.codes_of.
    """
    PLANES: tl.constexpr = 16 // BITS
    WIDTH: tl.constexpr = D // PLANES
    LEVELS: tl.constexpr = 1 << BITS
    pair, new = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, WIDTH)
    x_at = x + (pair * NEW + new).to(tl.int64) * D + i
    high, low = 0.0, 0.0
    for plane in tl.static_range(PLANES):
        part = tl.load(x_at + plane * WIDTH).to(tl.float32)
        high = tl.maximum(high, tl.max(part, axis=0))
        low = tl.minimum(low, tl.min(part, axis=0))
    reach = tl.maximum(high, -low) if SYMMETRIC else high - low
    size = tl.div_rn(reach, LEVELS // 2 - 1.0 if SYMMETRIC else LEVELS - 1.0)
    size = tl.where(size > 0, size, 1.0)
    zero = LEVELS // 2 * 1.0
    if not SYMMETRIC:
        zero = tl.minimum((tl.div_rn(-low, size) + 12582912.0) - 12582912.0, LEVELS - 1.0)  # rounded: norm_quantize.py
    inverse = tl.div_rn(1.0, size)
    word = tl.zeros((WIDTH,), tl.int32)
    for plane in tl.static_range(PLANES):
        steps = divide(tl.load(x_at + plane * WIDTH).to(tl.float32), size, inverse)
        steps = tl.minimum(tl.maximum(steps, -zero), (LEVELS - 1) - zero)
        code = ((steps + 12582912.0).to(tl.int32, bitcast=True) - MAGIC) + tl.cast(zero, tl.int32)
        word |= code << (plane * BITS)
    token = pair.to(tl.int64) * CAPACITY + tl.load(places + pair // KV_HEADS) + new
    tl.store(words + token * WIDTH + i, word.to(tl.int16))
    grid = tl.cast(size, tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    tl.store(grids + token, grid | tl.cast(zero, tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@dataclass(frozen=True, eq=False)
class QuantizedCache:
    """Keys or values of 4 or 8 bits.

    `words` int16 [batch, kv_heads, capacity, d * bits / 16] holds channel j * width + i in plane j of word i; `grids`
    int32 [batch, kv_heads, capacity] the scale of a token in its low half and the zero point in its high one, both
    float16.
    """

    scheme: Scheme
    words: Tensor
    grids: Tensor

    @classmethod
    def empty(
        cls, scheme: str, batch: int, heads: int, capacity: int, d: int, device: str | torch.device = "cpu"
    ) -> "QuantizedCache":
        """Room for `capacity` tokens of `d` channels, d a power of two from 64 on, rounded by what `accepts` takes."""
        kind = Scheme.parse(scheme)
        words = torch.zeros(batch, heads, capacity, d * kind.bits // 16, dtype=torch.int16, device=device)
        return cls(kind, words, torch.zeros(batch, heads, capacity, dtype=torch.int32, device=device))

    @property
    def d(self) -> int:
        """Channels of a token."""
        return self.words.shape[3] * 16 // self.scheme.bits


def accepts(scheme: str) -> Answer:
    """Whether a cache of this scheme can be attended to: whole numbers of 4 or 8 bits, a scale for each token."""
    kind = Scheme.parse(scheme)
    if kind.code != "int" or kind.bits not in (4, 8):
        return No(f"a cache of {kind.code}{kind.bits} codes, not int4 or int8")
    return (kind.granularity == "token" and kind.dynamic) or No(
        f"a cache of scheme {scheme} has no scale for each token"
    )


def kv_append(x: Tensor, cache: QuantizedCache, places: Tensor) -> None:
    """Store x [batch, kv_heads, new, d], contiguous, in the cache from token places (int32 [batch]) on."""
    batch, heads, new, d = x.shape
    kv_append_kernel[batch * heads, new](
        x,
        cache.words,
        cache.grids,
        places,
        NEW=new,
        KV_HEADS=heads,
        D=d,
        CAPACITY=cache.words.shape[2],
        BITS=cache.scheme.bits,
        SYMMETRIC=cache.scheme.symmetric,
        MAGIC=MAGIC,
        num_warps=1,
    )


def build(width: int, d: int = 128) -> Build:
    """What is compiled to store a token of `d` channels in `width` bits."""
    return Build(
        name=f"kv_append int{width} fp16 d={d}",
        kernel=kv_append_kernel,
        arguments={"x": "*fp16", "words": "*i16", "grids": "*i32", "places": "*i32"},
        constants={
            "NEW": 1,
            "KV_HEADS": 8,
            "D": d,
            "CAPACITY": 32768,
            "BITS": width,
            "SYMMETRIC": False,
            "MAGIC": MAGIC,
        },
        handled=d,
        warps=1,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship."""
    yield from (build(4), build(8))
