"""kv_window: new keys and values beside a window of floats: kept as they are while recent, rounded as they leave it.

One launch writes the new tokens' floats, and rounds those that are no longer recent, each token by itself; a second one
rounds the keys of the blocks that have become full, for each channel over the block's tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.kernels.cost import H200, Device
from qcompiler.kernels.kv_append import code_of, grid_for, kind_of, place_of, round_token, set_plane, store_cell
from qcompiler.kernels.kv_cache import KvWindow, QuantizedCache, windowed
from qcompiler.kernels.planes import LEAST, MAGNIFY
from qcompiler.kernels.sass import Build


@triton.jit
def append_tokens_kernel(
    k,
    v,
    float_keys,
    float_values,
    key_words,
    value_words,
    key_grids,
    value_grids,
    begins,
    places,
    NEW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    RING: tl.constexpr,
    RECENT: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    TABLED: tl.constexpr,
    KEY_SYMMETRIC: tl.constexpr,
    VALUE_SYMMETRIC: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
):
    """k and v [batch, KV_HEADS, NEW, D] into window and caches, from places [batch] on.

    Program (i, j): batch and head i, token places - RECENT + j. With BLOCK keys are not rounded here.
    """
    VALUE_PLACE: tl.constexpr = 8 if BITS == 3 else 0
    CELL: tl.constexpr = 3 * D // 8 if BITS == 3 else D * BITS // 16
    pair, j = tl.program_id(0), tl.program_id(1)
    old = tl.load(places + pair // KV_HEADS)
    begin = tl.load(begins + pair // KV_HEADS)
    token = old - RECENT + j
    leaves = token < old + NEW - RECENT
    if token < 0:
        return
    d = tl.arange(0, D)
    wide = pair.to(tl.int64)
    ring_at = (wide * (FIRST + RING) + FIRST + token % RING) * D
    if token >= old:
        new_at = (wide * NEW + token - old) * D
        key, value = tl.load(k + new_at + d), tl.load(v + new_at + d)
        kept = d * 0 + token >= old + NEW - RING
        tl.store(float_keys + ring_at + d, key, mask=kept)
        tl.store(float_values + ring_at + d, value, mask=kept)
        if (token >= begin) & (token - begin < FIRST):
            first_at = (wide * (FIRST + RING) + token - begin) * D
            tl.store(float_keys + first_at + d, key)
            tl.store(float_values + first_at + d, value)
    if not leaves:
        return
    at = wide * CAPACITY + token
    if token >= old:
        key_at, value_at = k + (wide * NEW + token - old) * D, v + (wide * NEW + token - old) * D
    else:
        key_at, value_at = float_keys + ring_at, float_values + ring_at
    if BLOCK == 0:
        key_words_at, key_grids_at = key_words + at * CELL, key_grids + at * KEY_GROUPS
        round_token(key_at, key_words_at, key_grids_at, key_at, 0, D, KEY_GROUPS, BITS, KEY_SYMMETRIC, TABLED, 0, False)
    if VALUE_PLACE:
        tl.debug_barrier()  # keys and values share words
    words_at, grids_at = value_words + at * CELL, value_grids + at * VALUE_GROUPS
    rounded_at = float_values + ring_at
    kept = (token >= old + NEW - RING).to(tl.int32)  # not overtaken, in the ring, by a newer token
    round_token(
        value_at,
        words_at,
        grids_at,
        rounded_at,
        kept,
        D,
        VALUE_GROUPS,
        BITS,
        VALUE_SYMMETRIC,
        TABLED,
        VALUE_PLACE,
        BLOCK > 0,
    )


@triton.jit
def load_block(k, ring, pair, token, old, begin, i, NEW: tl.constexpr, D: tl.constexpr, RING: tl.constexpr):
    """Channels i of the tokens' keys, float32 [tokens, channels], the new ones from k; padding is zero."""
    fresh = token >= old
    seen = (token >= begin) & (token < old + NEW)
    new_at = (pair.to(tl.int64) * NEW + token - old)[:, None] * D + i[None, :]
    ring_at = (token % RING)[:, None] * D + i[None, :]
    new = tl.load(k + new_at, mask=(seen & fresh)[:, None], other=0.0).to(tl.float32)
    return new + tl.load(ring + ring_at, mask=(seen & (token < old))[:, None], other=0.0).to(tl.float32)


@triton.jit
def append_blocks_kernel(
    k,
    float_keys,
    words,
    grids,
    units,
    begins,
    places,
    NEW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCKS: tl.constexpr,
    RING: tl.constexpr,
    RECENT: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TABLED: tl.constexpr,
    LEAST: tl.constexpr,
    MAGNIFY: tl.constexpr,
):
    """Round the keys of the blocks that k [batch, KV_HEADS, NEW, D] fills, for each channel, to shares of a unit.

    Program (i, j): batch and head i, the j-th block that was not full before. Runs after append_tokens_kernel.
    """
    PLANES: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    WIDTH: tl.constexpr = D // PLANES
    CELL: tl.constexpr = 3 * WIDTH if BITS == 3 else WIDTH
    pair = tl.program_id(0)
    old = tl.load(places + pair // KV_HEADS)
    begin = tl.load(begins + pair // KV_HEADS)
    block = tl.maximum(old - RECENT, 0) // BLOCK + tl.program_id(1)
    if (block + 1) * BLOCK > old + NEW - RECENT:
        return
    token = block * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, WIDTH)
    ring = float_keys + (pair.to(tl.int64) * (FIRST + RING) + FIRST) * D
    largest = tl.program_id(1) * 0.0
    for plane in tl.static_range(PLANES):
        part = load_block(k, ring, pair, token, old, begin, plane * WIDTH + i, NEW, D, RING)
        high, low = tl.maximum(tl.max(part, axis=0), 0.0), tl.minimum(tl.min(part, axis=0), 0.0)
        size, zero = grid_for(high, low, BITS, SYMMETRIC, TABLED)
        largest = tl.maximum(largest, tl.max(size, axis=0))
    # The least power of two that is not smaller: all mantissas but zero carry into the exponent.
    unit = ((largest.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    here = pair.to(tl.int64) * BLOCKS + block
    tl.store(units + here, unit)
    none = tl.zeros((BLOCK, WIDTH), tl.int32)
    words_of = (none, none, none)
    for plane in tl.static_range(PLANES):
        part = load_block(k, ring, pair, token, old, begin, plane * WIDTH + i, NEW, D, RING)
        high, low = tl.maximum(tl.max(part, axis=0), 0.0), tl.minimum(tl.min(part, axis=0), 0.0)
        size, zero = grid_for(high, low, BITS, SYMMETRIC, TABLED)
        inverse = tl.div_rn(size * 0.0 + 1.0, size)
        code = code_of(part, size[None, :], zero[None, :], inverse[None, :], BITS, TABLED)
        words_of = set_plane(words_of, place_of(code, TABLED), plane, BITS)
        multiplier = (tl.div_rn(size, size * 0.0 + unit) * MAGNIFY).to(grids.dtype.element_ty)
        grid_at = grids + here * (2 * D) + plane * WIDTH + i
        tl.store(grid_at, multiplier)
        tl.store(grid_at + D, (-(zero * LEAST) * multiplier.to(tl.float32)).to(grids.dtype.element_ty))
    at = (pair.to(tl.int64) * CAPACITY + token)[:, None] * CELL + i[None, :]
    store_cell(words + at, words_of, BITS, 0, WIDTH, token[:, None] >= 0)


def window_append(
    k: Tensor,
    v: Tensor,
    keys: QuantizedCache,
    values: QuantizedCache,
    window: KvWindow,
    begins: Tensor,
    places: Tensor,
    fresh: bool = False,
) -> None:
    """Append k and v [batch, kv_heads, new, d], contiguous, in the window's dtype, from places (int32 [batch]) on.

    `begins` int32 [batch] are the first tokens that are not padding. Into caches that hold tokens go `window.ahead` at
    once; with `fresh` (all places are 0) any number.
    """
    batch, heads, new, _ = k.shape
    if new > window.ahead and not fresh:
        raise InputError(f"{new} new tokens at once, into a window with room for {window.ahead}; append them in parts")
    fixed = constants(keys, window, new)
    append_tokens_kernel[batch * heads, new + window.recent](
        k,
        v,
        window.keys,
        window.values,
        keys.words,
        values.words,
        keys.grids,
        values.grids,
        begins,
        places,
        **fixed,
        **of_tokens(keys, values, window),
        num_warps=1,
    )
    if window.block:
        append_blocks_kernel[batch * heads, new // window.block + 1](
            k,
            window.keys,
            keys.words,
            keys.grids,
            window.units,
            begins,
            places,
            **fixed,
            **of_blocks(keys, window),
            num_warps=8,
        )


def constants(keys: QuantizedCache, window: KvWindow, new: int) -> dict[str, Any]:
    """What a launch of either kernel fixes."""
    _, heads, capacity = keys.words.shape[:3]
    fixed = {"NEW": new, "KV_HEADS": heads, "D": keys.d, "CAPACITY": capacity, "RING": window.ring}
    fixed |= {"RECENT": window.recent, "FIRST": window.first, "BLOCK": window.block}
    return fixed | {"BITS": keys.scheme.bits, "TABLED": keys.scheme.code == "nf"}


def of_tokens(keys: QuantizedCache, values: QuantizedCache, window: KvWindow) -> dict[str, Any]:
    """What a launch of append_tokens_kernel fixes beside."""
    symmetric = {"KEY_SYMMETRIC": keys.scheme.symmetric, "VALUE_SYMMETRIC": values.scheme.symmetric}
    return symmetric | {"KEY_GROUPS": 1 if window.block else keys.groups, "VALUE_GROUPS": values.groups}


def of_blocks(keys: QuantizedCache, window: KvWindow) -> dict[str, Any]:
    """What a launch of append_blocks_kernel fixes beside."""
    dtype = window.keys.dtype
    fixed = {"BLOCKS": window.units.shape[2], "SYMMETRIC": kind_of(keys.scheme)["SYMMETRIC"]}
    return fixed | {"LEAST": LEAST[dtype], "MAGNIFY": MAGNIFY[dtype]}


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship: KIVI's, one new token."""
    caches = QuantizedCache.pair("int4:channel:asym:dynamic", "int4:g32:asym:dynamic", 1, 8, 32768, 128, "meta")
    keys, values, window = windowed(caches, torch.float16, recent=128, first=4, block=128)
    fixed = constants(keys, window, 1)
    floats = dict.fromkeys(("k", "v", "float_keys", "float_values"), "*fp16")
    integers = dict.fromkeys(("begins", "places"), "*i32")
    words = {"key_words": "*i16", "value_words": "*i16", "key_grids": "*fp16", "value_grids": "*i32"}
    yield Build(
        name="append_tokens int4 g32 fp16 d=128 block=128",
        kernel=append_tokens_kernel,
        arguments=floats | integers | words,
        constants=fixed | of_tokens(keys, values, window),
        handled=2 * 128,
        warps=1,
    )
    yield Build(
        name="append_blocks int4 fp16 d=128 block=128",
        kernel=append_blocks_kernel,
        arguments={"k": "*fp16", "float_keys": "*fp16", "words": "*i16", "grids": "*fp16", "units": "*fp32"} | integers,
        constants=fixed | of_blocks(keys, window),
        handled=128 * 128,
        warps=8,
    )
