"""attention_kvq: one new token's attention over keys and values of 4 or 8 bits, as kv_append stores them.

A decoding step reads the whole cache once. Its codes lie in planes along the channels (planes.py): an AND and a product
unpack two channels at once, in the order of the tensor cores. Scales and zero points belong to a token: a key's are
applied to its score, a value's to its weight, and the codes stay whole numbers. Query heads that share a key head are
the rows of one product.

The tokens are split over programs; each leaves its sum, its largest score and the sum of its weights, which a second,
small kernel puts together (flash decoding).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.kv_append import QuantizedCache
from qcompiler.kernels.planes import MIDDLE, unpack
from qcompiler.kernels.sass import Build

STEP = 128  # tokens of a pass through the loop
LIFTED = tl.constexpr(64.0)  # weights times a value's scale are small; 16 bits hold them better so


@triton.jit
def grid_pair(pair):
    """Scale and zero point, float32 each, of int32 words that hold both as float16."""
    scale = pair.to(tl.int16).to(tl.float16, bitcast=True)
    zero = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def attention_kvq_kernel(
    q,
    keys,
    values,
    key_grids,
    value_grids,
    begins,
    ends,
    sums,
    largest,
    weights,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    LEAST: tl.constexpr,
):
    """q [batch, KV_HEADS * HEADS, D] over caches int16 [batch, KV_HEADS, CAPACITY, D * BITS / 16], part by part.

    Program (i, j) takes batch and key head i, and the j-th part of tokens begins to ends [batch]. It writes sums
    float32 [i, SPLITS, ROWS, D], and the largest score (to base 2) and the sum of weights, [i, SPLITS, ROWS].
    """
    PLANES: tl.constexpr = 16 // BITS
    WIDTH: tl.constexpr = D // PLANES
    DTYPE: tl.constexpr = q.dtype.element_ty
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = pair // KV_HEADS
    begin = tl.load(begins + batch)
    end = tl.load(ends + batch)
    each = ((end - begin + SPLITS - 1) // SPLITS + STEP - 1) // STEP * STEP
    h = tl.arange(0, ROWS)
    t = tl.arange(0, STEP)
    i = tl.arange(0, WIDTH)
    q_at = q + (pair * HEADS + h[:, None]) * D + i[None, :]
    there = h[:, None] < HEADS
    one = tl.full((WIDTH,), 1.0 / LEAST / 512.0, tl.float32).to(DTYPE)  # codes become multiples of 1 / 512
    ones = tl.full((STEP,), 1.0 / LEAST / 512.0, tl.float32).to(DTYPE)
    none = tl.zeros((WIDTH,), DTYPE)
    nones = tl.zeros((STEP,), DTYPE)

    q_sum = tl.zeros((ROWS,), tl.float32)
    for plane in tl.static_range(PLANES):
        q_sum += tl.sum(tl.load(q_at + plane * WIDTH, mask=there, other=0.0).to(tl.float32), axis=1)
    high = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    offset = tl.zeros((ROWS,), tl.float32)
    acc0 = tl.zeros((ROWS, WIDTH), tl.float32)
    acc1 = tl.zeros((ROWS, WIDTH), tl.float32)
    acc2 = tl.zeros((ROWS, WIDTH), tl.float32)
    acc3 = tl.zeros((ROWS, WIDTH), tl.float32)
    first = begin + split * each
    for start in tl.range(first, tl.minimum(first + each, end), STEP):
        seen = start + t < end
        token = pair.to(tl.int64) * CAPACITY + start + t
        words = tl.trans(tl.load(keys + token[:, None] * WIDTH + i[None, :], mask=seen[:, None], other=0))
        score = tl.zeros((ROWS, STEP), tl.float32)
        for plane in tl.static_range(PLANES):
            rows = tl.load(q_at + plane * WIDTH, mask=there, other=0.0)
            score = tl.dot(rows, unpack(words, one, none, plane, BITS, MIDDLE), score)
        size, zero = grid_pair(tl.load(key_grids + token, mask=seen, other=0))
        score = (score * 512.0 - q_sum[:, None] * zero[None, :]) * (size * scale)[None, :]
        score = tl.where(seen[None, :], score, -1e30)
        highest = tl.maximum(high, tl.max(score, axis=1))
        fade = tl.exp2(high - highest)
        weight = tl.exp2(score - highest[:, None])
        high = highest
        total = total * fade + tl.sum(weight, axis=1)

        words = tl.load(values + token[:, None] * WIDTH + i[None, :], mask=seen[:, None], other=0)
        size, zero = grid_pair(tl.load(value_grids + token, mask=seen, other=0))
        weight = weight * (size * LIFTED)[None, :]
        offset = offset * fade + tl.sum(weight * zero[None, :], axis=1)
        part = weight.to(DTYPE)
        acc0 = tl.dot(part, unpack(words, ones, nones, 0, BITS, MIDDLE), acc0 * fade[:, None])
        acc1 = tl.dot(part, unpack(words, ones, nones, 1, BITS, MIDDLE), acc1 * fade[:, None])
        if PLANES > 2:
            acc2 = tl.dot(part, unpack(words, ones, nones, 2, BITS, MIDDLE), acc2 * fade[:, None])
            acc3 = tl.dot(part, unpack(words, ones, nones, 3, BITS, MIDDLE), acc3 * fade[:, None])

    place = (pair * SPLITS + split) * ROWS + h
    tl.store(largest + place, high)
    tl.store(weights + place, total)
    sums_at = sums + place[:, None] * D + i[None, :]
    tl.store(sums_at, (acc0 * 512.0 - offset[:, None]) / LIFTED)
    tl.store(sums_at + WIDTH, (acc1 * 512.0 - offset[:, None]) / LIFTED)
    if PLANES > 2:
        tl.store(sums_at + 2 * WIDTH, (acc2 * 512.0 - offset[:, None]) / LIFTED)
        tl.store(sums_at + 3 * WIDTH, (acc3 * 512.0 - offset[:, None]) / LIFTED)


@triton.jit
def join_parts_kernel(
    sums,
    largest,
    weights,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The parts of `attention_kvq_kernel` put together: out [batch * kv_heads, HEADS, D]; program (i, j) does one."""
    pair, head = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, PARTS)
    there = split < SPLITS
    place = (pair * SPLITS + split) * ROWS + head
    high = tl.load(largest + place, mask=there, other=-1e30)
    factor = tl.exp2(high - tl.max(high, axis=0))
    total = tl.sum(tl.load(weights + place, mask=there, other=0.0) * factor, axis=0)
    d = tl.arange(0, D)
    parts = tl.load(sums + place[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
    whole = tl.sum(parts * factor[:, None], axis=0) / total
    tl.store(out + (pair * HEADS + head) * D + d, whole.to(out.dtype.element_ty))


def attention_kvq(
    q: Tensor,
    keys: QuantizedCache,
    values: QuantizedCache,
    begins: Tensor,
    ends: Tensor,
    scale: float,
    splits: int = 0,
) -> Tensor:
    """Attention of the newest token's q [batch, heads, d], float16 or bfloat16, over cached tokens begins to ends.

    `begins` and `ends`, int32 [batch], leave out padding, and what a window no longer shows. Returns [batch, heads, d].
    Keys and values have the same number of bits.
    """
    batch, heads, d = q.shape
    kv_heads, capacity = keys.words.shape[1:3]
    pairs, group = batch * kv_heads, heads // kv_heads
    rows = max(16, triton.next_power_of_2(group))
    splits = splits or configure(pairs, capacity, device_of(q))
    sums = q.new_empty((pairs, splits, rows, d), dtype=torch.float32)
    largest, weights = q.new_empty((2, pairs, splits, rows), dtype=torch.float32)
    attention_kvq_kernel[pairs, splits](
        q,
        keys.words,
        values.words,
        keys.grids,
        values.grids,
        begins,
        ends,
        sums,
        largest,
        weights,
        scale * 1.4426950408889634,  # exp2 is what the GPU has
        **constants(q.dtype, group, kv_heads, d, capacity, keys.scheme.bits, splits),
        num_warps=4,
        num_stages=3,
    )
    out = torch.empty_like(q)
    parts = triton.next_power_of_2(splits)
    join_parts_kernel[pairs, group](
        sums, largest, weights, out, HEADS=group, D=d, SPLITS=splits, PARTS=parts, ROWS=rows, num_warps=4
    )
    return out


def constants(
    dtype: torch.dtype, group: int, kv_heads: int, d: int, capacity: int, width: int, splits: int
) -> dict[str, int | float]:
    """What a launch fixes."""
    return {
        "HEADS": group,
        "KV_HEADS": kv_heads,
        "D": d,
        "CAPACITY": capacity,
        "BITS": width,
        "SPLITS": splits,
        "ROWS": max(16, triton.next_power_of_2(group)),
        "STEP": STEP,
        "LEAST": 2.0**-24 if dtype == torch.float16 else 2.0**-133,
    }


def configure(pairs: int, capacity: int, device: Device = H200) -> int:
    """Into how many parts the tokens are split: four programs to a processor, each of four steps or more."""
    return max(1, min(-(-4 * device.processors // pairs), capacity // (4 * STEP), 64))


def cost(keys: QuantizedCache, tokens: int, heads: int) -> Cost:
    """What one step over `tokens` cached tokens reads and computes."""
    batch, kv_heads = keys.words.shape[:2]
    bytes_of_token = 2 * (keys.d * keys.scheme.bits // 8 + 4)
    return Cost(batch * kv_heads * tokens * bytes_of_token, 4 * batch * heads * tokens * keys.d)


BUDGET = {4: 3.6, 8: 7.0}  # instructions for a channel of a key or a value


def build(width: int, group: int, dtype: str = "fp16", d: int = 128, device: Device = H200) -> Build:
    """What is compiled for a cache of `width` bits whose heads each serve `group` query heads."""
    kind = torch.float16 if dtype == "fp16" else torch.bfloat16
    fixed = constants(kind, group, 8, d, 32768, width, configure(8, 32768, device))
    return Build(
        name=f"attention_kvq int{width} {dtype} d={d} group={group}",
        kernel=attention_kvq_kernel,
        arguments={"q": f"*{dtype}", "keys": "*i16", "values": "*i16", "key_grids": "*i32", "value_grids": "*i32"}
        | {"begins": "*i32", "ends": "*i32", "sums": "*fp32", "largest": "*fp32", "weights": "*fp32", "scale": "fp32"},
        constants=fixed,
        handled=2 * STEP * d,
        budget=BUDGET[width],
        stages=3,
    )


def join_build(group: int, d: int = 128) -> Build:
    """What is compiled to put 64 parts together."""
    return Build(
        name=f"join_parts d={d} group={group}",
        kernel=join_parts_kernel,
        arguments={"sums": "*fp32", "largest": "*fp32", "weights": "*fp32", "out": "*fp16"},
        constants={"HEADS": group, "D": d, "SPLITS": 64, "PARTS": 64, "ROWS": 16},
        handled=d,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship: heads alone and in groups."""
    for width in (4, 8):
        yield build(width, 1, device=device)
        yield build(width, 8, device=device)
        yield build(width, 8, "bf16", device=device)
    yield join_build(8)
