"""attention_floats: the part of attention over tokens that keep their floats, and all parts put together.

Beside a cache of few bits the first tokens of a sequence and the newest are kept as they were (kv_cache.KvWindow). They
are few: one program for each key head does them, and leaves what a part of attention_kvq leaves.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Device
from qcompiler.kernels.kv_cache import KvWindow
from qcompiler.kernels.sass import Build

STEP = 32  # tokens of a pass through the loop


@triton.jit
def attend_floats_kernel(
    q,
    keys,
    values,
    begins,
    ends,
    sums,
    largest,
    weights,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    RING: tl.constexpr,
    BLOCK: tl.constexpr,
    RECENT: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """q [batch, KV_HEADS * HEADS, D] over the tokens in floats [batch, KV_HEADS, FIRST + RING, D]: the last part."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    pair = tl.program_id(0)
    batch = pair // KV_HEADS
    begin = tl.load(begins + batch)
    end = tl.load(ends + batch)
    rounded = tl.maximum(end - RECENT, 0)  # tokens before it are not seen as floats, but for the first
    if BLOCK:
        rounded = rounded // BLOCK * BLOCK
    ahead = tl.minimum(end - begin, FIRST)
    behind = tl.maximum(rounded, begin + FIRST)
    count = ahead + tl.maximum(end - behind, 0)
    h = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    rows = tl.load(q + (pair * HEADS + h[:, None]) * D + d[None, :], mask=h[:, None] < HEADS, other=0.0)
    high = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in tl.range(0, count, STEP):
        j = start + tl.arange(0, STEP)
        seen = j < count
        place = tl.where(j < ahead, j, FIRST + (behind + j - ahead) % RING)
        at = (pair.to(tl.int64) * (FIRST + RING) + place)[:, None] * D + d[None, :]
        key = tl.load(keys + at, mask=seen[:, None], other=0.0)
        score = tl.dot(rows, tl.trans(key)) * scale
        score = tl.where(seen[None, :], score, -1e30)
        highest = tl.maximum(high, tl.max(score, axis=1))
        fade = tl.exp2(high - highest)
        weight = tl.exp2(score - highest[:, None])
        high = highest
        total = total * fade + tl.sum(weight, axis=1)
        value = tl.load(values + at, mask=seen[:, None], other=0.0)
        acc = tl.dot(weight.to(DTYPE), value, acc * fade[:, None])
    place = (pair * PARTS + PARTS - 1) * ROWS + h
    tl.store(largest + place, high)
    tl.store(weights + place, total)
    tl.store(sums + place[:, None] * D + d[None, :], acc)


def attend_floats(
    q: Tensor, window: KvWindow, begins: Tensor, ends: Tensor, parts: tuple[Tensor, Tensor, Tensor], scale: float
) -> None:
    """Write the last of the parts (sums, largest scores, sums of weights) of attention_kvq; `scale` is to base 2."""
    sums, largest, weights = parts
    batch, heads, d = q.shape
    kv_heads = window.keys.shape[1]
    attend_floats_kernel[batch * kv_heads,](
        q,
        window.keys,
        window.values,
        begins,
        ends,
        sums,
        largest,
        weights,
        scale,
        HEADS=heads // kv_heads,
        KV_HEADS=kv_heads,
        D=d,
        RING=window.ring,
        BLOCK=window.block,
        RECENT=window.recent,
        FIRST=window.first,
        PARTS=sums.shape[1],
        ROWS=sums.shape[2],
        STEP=STEP,
        num_warps=4,
        num_stages=2,
    )


@triton.jit
def join_parts_kernel(
    sums,
    largest,
    weights,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    FILLED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The parts of attention_kvq put together: out [batch * kv_heads, HEADS, D]; program (i, j) does one."""
    pair, head = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, FILLED)
    there = split < PARTS
    place = (pair * PARTS + split) * ROWS + head
    high = tl.load(largest + place, mask=there, other=-1e30)
    factor = tl.exp2(high - tl.max(high, axis=0))
    total = tl.sum(tl.load(weights + place, mask=there, other=0.0) * factor, axis=0)
    d = tl.arange(0, D)
    parts = tl.load(sums + place[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
    whole = tl.sum(parts * factor[:, None], axis=0) / total
    tl.store(out + (pair * HEADS + head) * D + d, whole.to(out.dtype.element_ty))


def join_parts(sums: Tensor, largest: Tensor, weights: Tensor, out: Tensor, group: int) -> Tensor:
    """The parts [pairs, parts, rows, ...] put together into out [batch, heads, d], which is returned."""
    pairs, parts, rows, d = sums.shape
    filled = triton.next_power_of_2(parts)
    fixed = {"HEADS": group, "D": d, "PARTS": parts, "FILLED": filled, "ROWS": rows}
    join_parts_kernel[pairs, group](sums, largest, weights, out, **fixed, num_warps=4)
    return out


def join_build(group: int, d: int = 128) -> Build:
    """What is compiled to put 64 parts together."""
    return Build(
        name=f"join_parts d={d} group={group}",
        kernel=join_parts_kernel,
        arguments={"sums": "*fp32", "largest": "*fp32", "weights": "*fp32", "out": "*fp16"},
        constants={"HEADS": group, "D": d, "PARTS": 64, "FILLED": 64, "ROWS": 16},
        handled=d,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship."""
    fixed = {"HEADS": 8, "KV_HEADS": 8, "D": 128, "RING": 272, "BLOCK": 128, "RECENT": 128, "FIRST": 4}
    for dtype in ("fp16", "bf16"):
        yield Build(
            name=f"attend_floats {dtype} d=128 group=8",
            kernel=attend_floats_kernel,
            arguments={"q": f"*{dtype}", "keys": f"*{dtype}", "values": f"*{dtype}", "begins": "*i32", "ends": "*i32"}
            | {"sums": "*fp32", "largest": "*fp32", "weights": "*fp32", "scale": "fp32"},
            constants={**fixed, "PARTS": 65, "ROWS": 16, "STEP": STEP},
            handled=2 * STEP * 128,
            stages=2,
        )
    yield join_build(8)
