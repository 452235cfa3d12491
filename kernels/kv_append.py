"""kv_append: new keys or values, rounded token by token and stored in a cache of 3, 4 or 8 bits, or NF4."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Device
from qcompiler.kernels.kv_cache import QuantizedCache, accepts, nf4
from qcompiler.kernels.packed_integers import MAGIC
from qcompiler.kernels.quantize import divide
from qcompiler.kernels.sass import Build
from qcompiler.rounding import NF4
from qcompiler.scheme import Scheme

__all__ = ["QuantizedCache", "accepts", "build", "builds", "kv_append", "kv_append_kernel"]

WHOLE = tl.constexpr(MAGIC)
_BOOK = torch.tensor(NF4)
ENTRIES = tl.constexpr(tuple(_BOOK.tolist()))
MIDDLES = tl.constexpr(tuple(((_BOOK[1:] + _BOOK[:-1]) / 2).tolist()))  # between neighbouring codes of NF4


def _in_places(codes: range) -> int:
    """The places of eight codes of NF4, four bits each, as a signed number."""
    packed = sum(int(nf4(torch.float16).places[code]) << (4 * i) for i, code in enumerate(codes))
    return packed - (packed >> 31 << 32)


PLACES = tl.constexpr((_in_places(range(8)), _in_places(range(8, 16))))


@triton.jit
def round_half_even(x):
    """x as a whole number, still a float: adding and taking away 1.5 * 2^23 leaves whole numbers."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def grid_for(high, low, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TABLED: tl.constexpr):
    """Scale and zero point (0 with a table) of the grid that covers low to high, as qcompiler.rounding has it."""
    LEVELS: tl.constexpr = 1 << BITS
    reach = tl.maximum(high, -low) if SYMMETRIC or TABLED else high - low
    if TABLED:
        return tl.maximum(reach, 1e-30), reach * 0.0
    size = tl.div_rn(reach, reach * 0.0 + (LEVELS // 2 - 1.0 if SYMMETRIC else LEVELS - 1.0))
    size = tl.where(size > 0, size, 1.0)
    zero = size * 0.0 + LEVELS // 2
    if not SYMMETRIC:
        zero = tl.minimum(round_half_even(tl.div_rn(-low, size)), LEVELS - 1.0)
    return size, zero


@triton.jit
def code_of(values, size, zero, inverse, BITS: tl.constexpr, TABLED: tl.constexpr):
    """Codes of values, int32; with a table those of the nearest entries."""
    steps = divide(values, size, inverse)
    if TABLED:
        code = tl.zeros(steps.shape, tl.int32)
        for j in tl.static_range(15):
            code += (steps > MIDDLES[j]).to(tl.int32)
    else:
        steps = tl.minimum(tl.maximum(steps, -zero), ((1 << BITS) - 1) - zero)
        code = ((steps + 12582912.0).to(tl.int32, bitcast=True) - WHOLE) + zero.to(tl.int32)
    return code


@triton.jit
def place_of(code, TABLED: tl.constexpr):
    """What is stored for a code: with a table its place there (codebook.py)."""
    if TABLED:
        places = tl.where(code < 8, PLACES[0], PLACES[1])
        code = places >> ((code & 7) * 4) & 15
    return code


@triton.jit
def value_of(code, size, zero, TABLED: tl.constexpr):
    """The values that codes stand for, float32."""
    if TABLED:
        value = tl.full(code.shape, ENTRIES[0], tl.float32)
        for j in tl.static_range(1, 16):
            value = tl.where(code == j, ENTRIES[j], value)
        return value * size
    return (code.to(tl.float32) - zero) * size


@triton.jit
def set_plane(words, code, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Three int32 words of a cell (of one word the first is the cell) with `code` in plane PLANE."""
    word0, word1, word2 = words
    if BITS != 3:
        word0 |= code << (PLANE * BITS)
    elif PLANE < 5:
        word0 |= code << (3 * PLANE)
    elif PLANE < 10:
        word1 |= code << (3 * PLANE - 15)
    elif PLANE < 15:
        word2 |= code << (3 * PLANE - 30)
    else:
        word0 |= (code >> 2 & 1) << 15
        word1 |= (code >> 1 & 1) << 15
        word2 |= (code & 1) << 15
    return word0, word1, word2


@triton.jit
def store_cell(at, words, BITS: tl.constexpr, PLACE: tl.constexpr, WIDTH: tl.constexpr, mask):
    """Store the words of a token at `at`; with 3 bits beside the planes of its keys, or values, that are there."""
    if BITS == 3:
        MINE0: tl.constexpr = 0x7FFF if PLACE == 0 else 0x8000
        MINE1: tl.constexpr = 0x01FF if PLACE == 0 else 0xFE00
        old0 = tl.load(at, mask=mask, other=0).to(tl.int32)
        old1 = tl.load(at + WIDTH, mask=mask, other=0).to(tl.int32)
        tl.store(at, (old0 & (0xFFFF - MINE0) | words[0]).to(tl.int16), mask=mask)
        tl.store(at + WIDTH, (old1 & (0xFFFF - MINE1) | words[1]).to(tl.int16), mask=mask)
        if PLACE:
            tl.store(at + 2 * WIDTH, words[2].to(tl.int16), mask=mask)
    else:
        tl.store(at, words[0].to(tl.int16), mask=mask)


@triton.jit
def grid_word(size, zero):
    """Scale and zero point as float16 in the halves of an int32."""
    low = size.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | zero.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def round_token(
    x_at,
    words_at,
    grids_at,
    rounded_at,
    rounded,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TABLED: tl.constexpr,
    PLACE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Round the D numbers at x_at, group by group, and store codes and grids; if KEPT and `rounded`, values as well."""
    PLANES: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    WIDTH: tl.constexpr = D // PLANES
    i = tl.arange(0, WIDTH)
    none = tl.zeros((WIDTH,), tl.int32)
    words = (none, none, none)
    for group in tl.static_range(GROUPS):
        high, low = 0.0, 0.0
        for plane in tl.static_range(group * (PLANES // GROUPS), (group + 1) * (PLANES // GROUPS)):
            part = tl.load(x_at + plane * WIDTH + i).to(tl.float32)
            high = tl.maximum(high, tl.max(part, axis=0))
            low = tl.minimum(low, tl.min(part, axis=0))
        size, zero = grid_for(high, low, BITS, SYMMETRIC, TABLED)
        inverse = tl.div_rn(1.0, size)
        for plane in tl.static_range(group * (PLANES // GROUPS), (group + 1) * (PLANES // GROUPS)):
            code = code_of(tl.load(x_at + plane * WIDTH + i).to(tl.float32), size, zero, inverse, BITS, TABLED)
            words = set_plane(words, place_of(code, TABLED), PLACE + plane, BITS)
            if KEPT:
                value = value_of(code, size, zero, TABLED).to(rounded_at.dtype.element_ty)
                tl.store(rounded_at + plane * WIDTH + i, value, mask=i * 0 + rounded > 0)
        tl.store(grids_at + group, grid_word(size, zero))
    store_cell(words_at + i, words, BITS, PLACE, WIDTH, i >= 0)


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
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TABLED: tl.constexpr,
    PLACE: tl.constexpr,
):
    """Round x [batch, KV_HEADS, NEW, D] token by token, and store it in a cache from places [batch] on.

    Program (i, j): batch and head i, new token j. The codes are those of qcompiler.rounding.
    """
    CELL: tl.constexpr = 3 * D // 8 if BITS == 3 else D * BITS // 16
    pair, new = tl.program_id(0), tl.program_id(1)
    token = pair.to(tl.int64) * CAPACITY + tl.load(places + pair // KV_HEADS) + new
    x_at = x + (pair * NEW + new).to(tl.int64) * D
    words_at, grids_at = words + token * CELL, grids + token * GROUPS
    round_token(x_at, words_at, grids_at, x_at, 0, D, GROUPS, BITS, SYMMETRIC, TABLED, PLACE, False)


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
        GROUPS=cache.groups,
        **kind_of(cache.scheme),
        PLACE=cache.place,
        num_warps=1,
    )


def kind_of(scheme: Scheme) -> dict[str, int]:
    """What a scheme fixes of a kernel that rounds by it."""
    return {"BITS": scheme.bits, "SYMMETRIC": scheme.symmetric, "TABLED": scheme.code == "nf"}


def build(scheme: str, d: int = 128) -> Build:
    """What is compiled to store a token of `d` channels."""
    kind = Scheme.parse(scheme)
    fixed = {"NEW": 1, "KV_HEADS": 8, "D": d, "CAPACITY": 32768, "GROUPS": d // kind.group_of(d), "PLACE": 0}
    return Build(
        name=f"kv_append {scheme} fp16 d={d}",
        kernel=kv_append_kernel,
        arguments={"x": "*fp16", "words": "*i16", "grids": "*i32", "places": "*i32"},
        constants=fixed | kind_of(kind),
        handled=d,
        warps=1,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship."""
    for scheme in ("int3:token:asym", "int4:token:asym", "int8:token:asym", "int4:g32:asym", "nf4:token:sym"):
        yield build(f"{scheme}:dynamic")
