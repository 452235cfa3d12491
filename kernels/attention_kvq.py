"""attention_kvq: one new token's attention over keys and values of 3, 4 or 8 bits, or NF4, as kv_append stores them.

A decoding step reads the whole cache once. Its codes lie in planes along the channels (planes.py): an AND and a product
unpack two channels at once, in the order of the tensor cores. Scales and zero points of a token are applied to a key's
score and to a value's weight, group by group of channels, and the codes stay whole numbers. Keys with a scale for each
channel over a block of tokens (KIVI, arXiv 2402.02750) get theirs in the very FMA that unpacks: it costs nothing, and
what folding the scales into the query would cost for each block is saved. Query heads that share a key head are the
rows of one product.

The tokens are split over programs; each leaves its sum, its largest score and the sum of its weights, which a second,
small kernel puts together (flash decoding). Tokens that keep their floats are one more part (attention_floats.py).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.attention_floats import attend_floats, join_parts
from qcompiler.kernels.codebook import load_tables, look_up
from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.kv_cache import KvWindow, QuantizedCache, nf4, spread, windowed
from qcompiler.kernels.planes import MIDDLE, take_top, unpack
from qcompiler.kernels.sass import Build
from qcompiler.scheme import Scheme

# Tokens of a pass through the loop, if keys are not in smaller blocks; and warps. With 3 bits a plane is 16 channels:
# Triton gives such a product's rows, not its columns, to several warps, and all of them would unpack the same.
STEPS = {3: 64, 4: 128, 8: 128}
WARPS = {3: 1, 4: 4, 8: 4}
LIFTED = tl.constexpr(64.0)  # weights times a value's scale are small; 16 bits hold them better so


@triton.jit
def grid_pair(pair):
    """Scale and zero point, float32 each, of int32 words that hold both as float16."""
    scale = pair.to(tl.int16).to(tl.float16, bitcast=True)
    zero = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def load_cell(at, seen, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """The words of a token's cell, three with 3 bits; else the one, three times."""
    word0 = tl.load(at, mask=seen, other=0)
    if BITS == 3:
        word1 = tl.load(at + WIDTH, mask=seen, other=0)
        word2 = tl.load(at + 2 * WIDTH, mask=seen, other=0)
    else:
        word1, word2 = word0, word0
    return word0, word1, word2


@triton.jit
def plane_of(cell, multiplier, addend, tables, PLANE: tl.constexpr, BITS: tl.constexpr, TABLED: tl.constexpr):
    """Plane PLANE of a cell, times `multiplier` and plus `addend` (unless TABLED), both [rows]."""
    if TABLED:
        values = look_up(cell[0], multiplier, tables, PLANE)
    elif BITS != 3:
        values = unpack(cell[0], multiplier, addend, PLANE, BITS, MIDDLE)
    elif PLANE < 15:
        values = unpack(cell[PLANE // 5], multiplier, addend, PLANE % 5, BITS, MIDDLE)
    else:
        spare = take_top(take_top(take_top(tl.zeros_like(cell[0]), cell[0]), cell[1]), cell[2])
        values = unpack(spare, multiplier, addend, 0, BITS, MIDDLE)
    return values


@triton.jit
def attention_kvq_kernel(
    q,
    keys,
    values,
    key_grids,
    value_grids,
    units,
    tables,
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
    TABLED: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    RECENT: tl.constexpr,
    FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    LEAST: tl.constexpr,
    KEY_SPREAD: tl.constexpr,
    VALUE_SPREAD: tl.constexpr,
):
    """q [batch, KV_HEADS * HEADS, D] over caches of kv_cache.QuantizedCache, part by part.

    Program (i, j) takes batch and key head i, and the j-th part of tokens begins + FIRST to ends - RECENT [batch], of
    whole blocks with BLOCK. It writes sums float32 [i, PARTS, ROWS, D], and the largest score (to base 2) and the sum
    of weights, [i, PARTS, ROWS].
    """
    PLANES: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    WIDTH: tl.constexpr = D // PLANES
    CELL: tl.constexpr = 3 * WIDTH if BITS == 3 else WIDTH
    VALUE_PLACE: tl.constexpr = 8 if BITS == 3 else 0
    DTYPE: tl.constexpr = q.dtype.element_ty
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = pair // KV_HEADS
    begin = tl.load(begins + batch) + FIRST
    end = tl.load(ends + batch) - RECENT
    base = begin
    if BLOCK:
        end = tl.maximum(end, 0) // BLOCK * BLOCK
        base = begin // BLOCK * BLOCK
    each = ((tl.maximum(end - base, 0) + SPLITS - 1) // SPLITS + STEP - 1) // STEP * STEP
    h = tl.arange(0, ROWS)
    t = tl.arange(0, STEP)
    i = tl.arange(0, WIDTH)
    q_at = q + (pair * HEADS + h[:, None]) * D + i[None, :]
    there = h[:, None] < HEADS
    # Codes become multiples of 1 / 512; the entries of a table are what they are.
    unit: tl.constexpr = 1.0 if TABLED else 1.0 / LEAST / 512.0
    one = tl.full((WIDTH,), unit, tl.float32).to(DTYPE)
    ones = tl.full((STEP,), unit, tl.float32).to(DTYPE)
    none = tl.zeros((WIDTH,), DTYPE)
    nones = tl.zeros((STEP,), DTYPE)
    table = load_tables(tables) if TABLED else (0, 0)

    q_sums = ()  # tuples grow by concatenation: Triton knows no star
    for group in tl.static_range(KEY_GROUPS):
        q_sum = tl.zeros((ROWS,), tl.float32)
        if not TABLED and BLOCK == 0:
            for plane in tl.static_range(group * (PLANES // KEY_GROUPS), (group + 1) * (PLANES // KEY_GROUPS)):
                q_sum += tl.sum(tl.load(q_at + plane * WIDTH, mask=there, other=0.0).to(tl.float32), axis=1)
        q_sums = q_sums + (q_sum,)  # type: ignore[assignment]  # noqa: RUF005
    high = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    offsets = ()
    for _ in tl.static_range(VALUE_GROUPS):
        offsets = offsets + (tl.zeros((ROWS,), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    accs = ()
    for _ in tl.static_range(PLANES):
        accs = accs + (tl.zeros((ROWS, WIDTH), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    first = base + split * each
    for start in tl.range(first, tl.minimum(first + each, end), STEP):
        seen = start + t < end
        if BLOCK:
            seen = seen & (start + t >= begin)
        token = pair.to(tl.int64) * CAPACITY + start + t
        if BLOCK:
            here = pair.to(tl.int64) * (CAPACITY // BLOCK) + start // BLOCK
        cell = load_cell(keys + token[:, None] * CELL + i[None, :], seen[:, None], BITS, WIDTH)
        cell = (tl.trans(cell[0]), tl.trans(cell[1]), tl.trans(cell[2]))
        score = tl.zeros((ROWS, STEP), tl.float32)
        for group in tl.static_range(KEY_GROUPS):
            part = tl.zeros((ROWS, STEP), tl.float32)
            for plane in tl.static_range(group * (PLANES // KEY_GROUPS), (group + 1) * (PLANES // KEY_GROUPS)):
                multiplier, addend = one, none
                if BLOCK:
                    grid_at = key_grids + here * (2 * D) + plane * WIDTH + i
                    multiplier, addend = tl.load(grid_at), tl.load(grid_at + D)
                rows = tl.load(q_at + plane * WIDTH, mask=there, other=0.0)
                part = tl.dot(rows, plane_of(cell, multiplier, addend, table, plane, BITS, TABLED), part)
            if BLOCK:
                score = part * (tl.load(units + here) * (scale * KEY_SPREAD))
            else:
                size, zero = grid_pair(tl.load(key_grids + token * KEY_GROUPS + group, mask=seen, other=0))
                part = part * KEY_SPREAD
                if not TABLED:
                    part -= q_sums[group][:, None] * zero[None, :]
                if KEY_GROUPS == 1:
                    score = part * (size * scale)[None, :]
                else:
                    score += part * (size * scale)[None, :]
        score = tl.where(seen[None, :], score, -1e30)
        highest = tl.maximum(high, tl.max(score, axis=1))
        fade = tl.exp2(high - highest)
        weight = tl.exp2(score - highest[:, None])
        high = highest
        total = total * fade + tl.sum(weight, axis=1)

        cell = load_cell(values + token[:, None] * CELL + i[None, :], seen[:, None], BITS, WIDTH)
        new_accs, new_offsets = (), ()
        for group in tl.static_range(VALUE_GROUPS):
            size, zero = grid_pair(tl.load(value_grids + token * VALUE_GROUPS + group, mask=seen, other=0))
            part = weight * (size * LIFTED)[None, :]
            offset = offsets[group]  # type: ignore[var-annotated]
            if not TABLED:
                offset = offset * fade + tl.sum(part * zero[None, :], axis=1)
            new_offsets = new_offsets + (offset,)  # type: ignore[assignment]  # noqa: RUF005
            part = part.to(DTYPE)
            for plane in tl.static_range(group * (PLANES // VALUE_GROUPS), (group + 1) * (PLANES // VALUE_GROUPS)):
                codes = plane_of(cell, ones, nones, table, VALUE_PLACE + plane, BITS, TABLED)
                summed = tl.dot(part, codes, accs[plane] * fade[:, None])
                new_accs = new_accs + (summed,)  # type: ignore[assignment]  # noqa: RUF005
        accs, offsets = new_accs, new_offsets

    place = (pair * PARTS + split) * ROWS + h
    tl.store(largest + place, high)
    tl.store(weights + place, total)
    sums_at = sums + place[:, None] * D + i[None, :]
    for plane in tl.static_range(PLANES):
        offset = offsets[plane * VALUE_GROUPS // PLANES]
        tl.store(sums_at + plane * WIDTH, (accs[plane] * VALUE_SPREAD - offset[:, None]) / LIFTED)


def attention_kvq(
    q: Tensor,
    keys: QuantizedCache,
    values: QuantizedCache,
    begins: Tensor,
    ends: Tensor,
    scale: float,
    splits: int = 0,
    window: KvWindow | None = None,
) -> Tensor:
    """Attention of the newest token's q [batch, heads, d], float16 or bfloat16, over cached tokens begins to ends.

    `begins` and `ends`, int32 [batch], leave out padding, and what a window no longer shows. Returns [batch, heads, d].
    Keys and values are what kv_cache.suits takes; with a `window` its tokens are seen as floats, as qc.attention says.
    """
    batch, heads, d = q.shape
    kv_heads, capacity = keys.words.shape[1:3]
    pairs, group = batch * kv_heads, heads // kv_heads
    fixed = constants(q.dtype, group, keys, values, window, splits or configure(pairs, capacity, device_of(q)))
    parts, rows = fixed["PARTS"], fixed["ROWS"]
    sums = q.new_empty((pairs, parts, rows, d), dtype=torch.float32)
    largest, weights = q.new_empty((2, pairs, parts, rows), dtype=torch.float32)
    base_two = scale * 1.4426950408889634  # exp2 is what the GPU has
    attention_kvq_kernel[pairs, fixed["SPLITS"]](
        q,
        keys.words,
        values.words,
        keys.grids,
        values.grids,
        largest if window is None else window.units,
        nf4(q.dtype, str(q.device)).registers if fixed["TABLED"] else keys.grids,
        begins,
        ends,
        sums,
        largest,
        weights,
        base_two,
        **fixed,
        num_warps=WARPS[keys.scheme.bits],
        num_stages=3,
    )
    if window is not None:
        attend_floats(q, window, begins, ends, (sums, largest, weights), base_two)
    return join_parts(sums, largest, weights, torch.empty_like(q), group)


def constants(
    dtype: torch.dtype,
    group: int,
    keys: QuantizedCache,
    values: QuantizedCache,
    window: KvWindow | None = None,
    splits: int = 1,
) -> dict[str, Any]:
    """What a launch fixes, for key heads that serve `group` query heads each."""
    block, recent, first = (window.block, window.recent, window.first) if window else (0, 0, 0)
    return {
        "HEADS": group,
        "KV_HEADS": keys.words.shape[1],
        "D": keys.d,
        "CAPACITY": keys.words.shape[2],
        "BITS": keys.scheme.bits,
        "TABLED": keys.scheme.code == "nf",
        "KEY_GROUPS": 1 if block else keys.groups,
        "VALUE_GROUPS": values.groups,
        "BLOCK": block,
        "RECENT": recent,
        "FIRST": first,
        "SPLITS": splits,
        "PARTS": splits + (window is not None),
        "ROWS": max(16, triton.next_power_of_2(group)),
        "STEP": min(block or STEPS[keys.scheme.bits], STEPS[keys.scheme.bits]),
        "LEAST": 2.0**-24 if dtype == torch.float16 else 2.0**-133,
        "KEY_SPREAD": spread(keys.scheme, dtype, shares=block > 0),
        "VALUE_SPREAD": spread(values.scheme, dtype, shares=False),
    }


def configure(pairs: int, capacity: int, device: Device = H200) -> int:
    """Into how many parts the tokens are split: four programs to a processor, each of 512 tokens or more."""
    return max(1, min(-(-4 * device.processors // pairs), capacity // 512, 64))


def cost(keys: QuantizedCache, tokens: int, heads: int) -> Cost:
    """What one step over `tokens` cached tokens reads and computes; keys as stored by token, values alike."""
    batch, kv_heads = keys.words.shape[:2]
    bytes_of_token = 2 * (keys.d * keys.scheme.bits // 8 + 4 * keys.groups)
    return Cost(batch * kv_heads * tokens * bytes_of_token, 4 * batch * heads * tokens * keys.d)


BUDGET = {"int3": 3.6, "int4": 3.6, "int8": 7.0}  # instructions for a channel of a key or a value, with long steps


def build(
    key: str, value: str, group: int, dtype: str = "fp16", block: int = 0, d: int = 128, device: Device = H200
) -> Build:
    """What is compiled for a cache of these schemes whose heads each serve `group` query heads."""
    kind = torch.float16 if dtype == "fp16" else torch.bfloat16
    keys, values = QuantizedCache.pair(key, value, 1, 8, 32768, d, "meta")
    window = None
    if block:
        keys, values, window = windowed((keys, values), kind, recent=128, first=4, block=block)
    fixed = constants(kind, group, keys, values, window, configure(8, 32768, device))
    name = f"{Scheme.parse(key).code}{Scheme.parse(key).bits}"
    plain = fixed["STEP"] == STEPS[fixed["BITS"]] and fixed["VALUE_GROUPS"] == fixed["KEY_GROUPS"] == 1
    pointers = {"keys": "*i16", "values": "*i16", "key_grids": "*i32", "value_grids": "*i32", "tables": "*i32"}
    if block:
        pointers["key_grids"] = f"*{dtype}"
    pointers |= {"begins": "*i32", "ends": "*i32", **dict.fromkeys(("units", "sums", "largest", "weights"), "*fp32")}
    return Build(
        name=f"attention_kvq {key} {value} {dtype} d={d} group={group}" + f" block={block}" * bool(block),
        kernel=attention_kvq_kernel,
        arguments={"q": f"*{dtype}", "scale": "fp32", **pointers},
        constants=fixed,
        handled=2 * fixed["STEP"] * d,
        budget=BUDGET.get(name, 0.0) if plain else 0.0,
        warps=WARPS[fixed["BITS"]],
        stages=3,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship: scales by token, by groups of channels, by blocks."""
    token = "{}:token:asym:dynamic".format
    for width in ("int3", "int4", "int8"):
        yield build(token(width), token(width), 8, device=device)
    yield build(token("int4"), token("int4"), 8, "bf16", device=device)
    yield build("nf4:token:sym:dynamic", "nf4:token:sym:dynamic", 8, device=device)
    yield build("int4:g32:asym:dynamic", "int4:g32:asym:dynamic", 8, device=device)
    for block in (32, 64, 128):
        yield build("int4:channel:asym:dynamic", token("int4"), 8, block=block, device=device)
