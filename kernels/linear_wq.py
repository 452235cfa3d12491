"""linear_wq: a float activation times a weight of 2, 3, 4 or 8 bits, for one to some hundred tokens.

A decoding step reads every weight once and does little with it, so the time is that of reading memory, if unpacking
keeps up: an H200 may spend about 4 instructions on a 4-bit weight. Here it is two to two and a half, of which an AND
and an FMA unpack (planes.py). What else keeps it low:

- The weight is the left operand of the product, [n, k] x [k, tokens]: Hopper's tensor cores take that one from
  registers, where unpacking leaves it, and the tokens need not be padded to 64.
- A tile of words is contiguous in memory; scales come two, zero points four to an int32, so that they too can be
  copied ahead by cp.async, which takes no less than 4 bytes.
- The group's scale is in the FMA that unpacks. The sum stays in the tensor cores; no group ends it.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels import tuned
from qcompiler.kernels.cost import H200, Cost, Device, device_at
from qcompiler.kernels.packed_weight import COLUMNS, ROWS, PackedWeight, group_of, tile_columns
from qcompiler.kernels.planes import MIDDLE, MINIMA, grid_of, take_top, unpack
from qcompiler.kernels.sass import Build
from qcompiler.kernels.split import (
    Config,
    add_parts,
    leave_part,
    most_registers,
    parts_of_k,
    room_for,
    store_sums,
    token_block,
)
from qcompiler.scheme import Scheme
from qcompiler.target import Kernel, bits, channel_or_group, integer_codes, matrix, without

ACCEPTS = (
    integer_codes()
    & bits(2, 3, 4, 8)
    & channel_or_group(32, 64, 128, 256)
    & matrix()
    & without("codebook", "boundaries")
)
KERNEL = Kernel("linear_wq", "linear", ACCEPTS)
MANY = 256  # tokens: more than one block of them, so that k is not split


@triton.jit
def stretch(step, start: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr):
    """Which stretch of SIZE columns column step * BK + start is in; where known, its last bits are seen to be."""
    if BK % SIZE == 0:
        return step * (BK // SIZE) + start // SIZE
    return (step * BK + start) // SIZE


@triton.jit
def linear_wq_kernel(
    x,
    words,
    scales,
    zeros,
    row_scale,
    bias,
    partial,
    arrived,
    out,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    GRID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """x [tokens, K] times the packed weight [N, K] transposed, plus bias [N], into out [tokens, N].

    Program (i, j, l) takes rows i * BN and on, the j-th part of K, tokens l * BM and on. `partial` is float32
    [SPLIT, tokens of all programs, N filled up].
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    FIELDS: tl.constexpr = 16 // BITS
    WIDTH: tl.constexpr = BK // (16 if BITS == 3 else FIELDS)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    RAGGED: tl.constexpr = STEPS * BK > K or EACH * SPLIT > STEPS
    FULL: tl.constexpr = (N + BN - 1) // BN * BN
    PER_WORD: tl.constexpr = 2 if GRID == MINIMA else 4  # zero points, or minima, of how many groups
    tl.static_assert(GROUP % WIDTH == 0 and (BK % GROUP == 0 or GROUP % BK == 0))

    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = split * EACH
    n = tile * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    i = tl.arange(0, WIDTH)
    words_at = words + tile * (STEPS * WORDS * BN * WIDTH) + tl.arange(0, BN)[:, None] * WIDTH + i[None, :]
    x_at = x + m[None, :] * K + first * BK + i[:, None]
    there = m[None, :] < tokens
    acc = tl.zeros((BN, BM), tl.float32)

    # Every part takes as many steps, also those beyond the end, where x is zero: with a number of steps that is not
    # known in advance, ptxas lets no two products of Hopper's tensor cores overlap.
    for step in tl.range(first, first + EACH):
        mask = there
        here = tl.minimum(step, STEPS - 1) if RAGGED else step
        spare = tl.zeros((BN, WIDTH), tl.int16)
        for start in tl.static_range(0, BK, WIDTH):  # where the columns of a plane start
            if BITS == 3 and start == 15 * WIDTH:
                raw = spare
            elif start % (FIELDS * WIDTH) == 0:
                raw = tl.load(words_at + (here * WORDS + start // (FIELDS * WIDTH)) * BN * WIDTH)
                if BITS == 3:
                    spare = take_top(spare, raw)
            if start % GROUP == 0:
                if start % (2 * GROUP) == 0:
                    pair = tl.load(scales + stretch(here, start, BK, 2 * GROUP) * FULL + n)
                if start % (PER_WORD * GROUP) == 0:
                    place = stretch(here, start, BK, PER_WORD * GROUP) * FULL
                    more = pair if GRID == MIDDLE else tl.load(zeros + place + n)
                multiplier, addend = grid_of(pair, more, stretch(here, start, BK, GROUP), BITS, GRID, DTYPE)
            if RAGGED:
                mask = there & (step * BK + start + i[:, None] < K)
            columns = tl.load(x_at + start, mask=mask, other=0.0)
            acc = tl.dot(unpack(raw, multiplier, addend, start // WIDTH % FIELDS, BITS, GRID), columns, acc)
        x_at += BK

    if SPLIT > 1:
        SUM: tl.constexpr = BM * FULL
        part_at = partial + m[None, :] * FULL + n[:, None]
        if leave_part(acc, part_at, arrived + tile, split, SUM, SPLIT):
            return
        acc = add_parts(acc, part_at, arrived + tile, SUM, SPLIT)
    store_sums(acc, row_scale, bias, out, m, n, tokens, N, HAS_BIAS)


def configure(n: int, k: int, columns: int, bits: int, tokens: int, device: Device = H200) -> Config:
    """The configuration for a weight [n, k] in tiles of `columns`, and `tokens` tokens: by rule, nothing is tried out.

    Two programs share a processor's memory.
    """
    block = token_block(tokens, 128)
    words = ROWS * columns * bits // 8
    if 2 * (words + 2 * block * columns) > device.shared - 8192:  # of which scales and zero points get less
        block = 64
    stages = device.shared // 2 // (words + 2 * block * columns)
    stages = max(2, min(stages, 3 if words >= 16384 else 4))
    split = parts_of_k(n, -(-k // columns), device) if tokens <= block else 1
    crowded = block == 128 or (block == 64 and bits == 2 and device.capability < 90)  # for the registers of 4 warps
    return Config(block, split, warps=8 if crowded else 4, stages=stages)


@functools.lru_cache(maxsize=4096)
def config_for(scheme: Scheme, shape: tuple[int, int], columns: int, tokens: int, index: int) -> Config:
    """The measured configuration for GPU `index` (-1: none), or the rule's, for so many tokens or a few less."""
    if index >= 0 and (found := tuned.find(torch.cuda.get_device_name(index), tuned.key_of(scheme, shape, tokens))):
        return found
    return configure(*shape, columns, scheme.bits, tokens, device_at(index))


def constants(shape: tuple[int, int], group: int, columns: int, config: Config) -> dict[str, int]:
    """What a launch fixes beside the weight's own kind."""
    n, k = shape
    return {"N": n, "K": k, "GROUP": group, "BM": config.tokens, "BN": ROWS, "BK": columns, "SPLIT": config.split}


def registers(grouped: bool, device: Device) -> int | None:
    """What ptxas is told; rows of one scale fit by themselves, and no more when it is told."""
    return most_registers(device) if grouped else None


def linear_wq(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x [..., k], contiguous, in the weight's dtype, times the weight [n, k] transposed, plus bias [n]: [..., n].

    For more tokens than dequantize_wq.FUSED, `linear_decoded` gives the same.

    With a permuted weight (act-order) x holds its channels in the stored order: the op before stores them so.
    """
    n, k = weight.shape
    tokens = x.numel() // k
    block = token_block(tokens, 128 if tokens <= 128 else MANY)
    chosen = config or config_for(weight.scheme, weight.shape, weight.columns, block, x.get_device())
    tiles = weight.words.shape[0]
    out, partial = room_for(x, n, tiles, chosen)
    linear_wq_kernel[tiles, chosen.split, triton.cdiv(tokens, chosen.tokens)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.row_scale,
        out if bias is None else bias,
        partial,
        weight.arrived,
        out,
        tokens,
        BITS=weight.scheme.bits,
        GRID=weight.grid,
        HAS_BIAS=bias is not None,
        **constants(weight.shape, weight.group, weight.columns, chosen),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        maxnreg=registers(weight.group < k, device_at(x.get_device())),
    )
    return out


def cost(weight: PackedWeight, tokens: int, device: Device = H200) -> Cost:
    """What a launch reads, writes and computes."""
    n, k = weight.shape
    config = configure(n, k, weight.columns, weight.scheme.bits, tokens, device)
    moved = weight.nbytes + 2 * tokens * (n + k)
    if config.split > 1:
        moved += 2 * 4 * config.split * tokens * n
    return Cost(moved, 2 * tokens * n * k)


ARGUMENTS = {
    "words": "*i16",
    "scales": "*i32",
    "zeros": "*i32",
    "row_scale": "*fp32",
    "partial": "*fp32",
    "arrived": "*i32",
    "tokens": "i32",
}
# Instructions for a weight: 16 tokens, groups of 128, steps of full length. Blackwell's unpacked weights are stored to
# the tensor cores' own memory, which costs 3 bits, whose steps are short, the most.
BUDGET = {2: 1.9, 3: 2.9, 4: 2.6, 8: 5.5}
BLACKWELL = BUDGET | {3: 3.5}


def build(text: str, n: int, k: int, tokens: int, dtype: str = "fp16", device: Device = H200) -> Build:
    """What is compiled for a weight [n, k] of a scheme such as "int4:g128:asym" and `tokens` tokens."""
    scheme = Scheme.parse(text)
    columns = tile_columns(scheme, n, k)
    config = configure(n, k, columns, scheme.bits, tokens, device)
    held = tokens <= 16 and scheme.group_of(k) >= 128 and columns == COLUMNS[scheme.bits]
    budget = (BLACKWELL if device.capability >= 100 else BUDGET)[scheme.bits]
    return Build(
        name=f"linear_wq {text} {dtype} {n}x{k} M={tokens}",
        kernel=linear_wq_kernel,
        arguments=ARGUMENTS | dict.fromkeys(("x", "bias", "out"), f"*{dtype}"),
        constants={
            "BITS": scheme.bits,
            "GRID": 0 if scheme.symmetric else 1,
            "HAS_BIAS": True,
            **constants((n, k), group_of(scheme, k, columns), columns, config),
        },
        handled=ROWS * columns,
        budget=budget if held else 0.0,
        warps=config.warps,
        stages=config.stages,
        registers=registers(scheme.group_of(k) < k, device),
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship, for layers of a model of 8 billion parameters."""
    large, small = (14336, 4096), (4096, 4096)
    for width in COLUMNS:
        for tokens in (1, 16):
            yield build(f"int{width}:g128:sym", *large, tokens, device=device)
        for tokens in (1, 16, 32, 64, 128):
            yield build(f"int{width}:g128:asym", *large, tokens, device=device)
        yield build(f"int{width}:g128:asym", *large, 16, "bf16", device)
        yield build(f"int{width}:g128:asym", *small, 16, device=device)
        yield build(f"int{width}:g32:asym", *large, 16, device=device)
        yield build(f"int{width}:channel:sym", *large, 16, device=device)
        blocks = build(f"int{width}:g32:asym", *large, 1, device=device)  # as GGUF's of type _1
        yield replace(blocks, name=f"{blocks.name} minima", constants={**blocks.constants, "GRID": 2})
