"""dequantize_wq: a packed weight back in 16 bits, for so many tokens that a plain product is what takes the time.

Past some hundred tokens the tensor cores are busy all the time, and whoever unpacks beside them only holds them up.
Decoding a weight of 4 bits writes 2 bytes and reads half a one, once for all tokens.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Cost, Device
from qcompiler.kernels.packed_weight import COLUMNS, ROWS, PackedWeight
from qcompiler.kernels.planes import MIDDLE, MINIMA, grid_of, take_top, unpack
from qcompiler.kernels.sass import Build

FUSED = 768  # tokens up to which linear_wq is expected to be faster; to be measured


@triton.jit
def dequantize_wq_kernel(
    words,
    scales,
    zeros,
    row_scale,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    GRID: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The packed weight as out [N, K]; program (i, j) takes the j-th tile of rows i * BN and on."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    FIELDS: tl.constexpr = 16 // BITS
    WIDTH: tl.constexpr = BK // (16 if BITS == 3 else FIELDS)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    FULL: tl.constexpr = (N + BN - 1) // BN * BN
    PER_WORD: tl.constexpr = 2 if GRID == MINIMA else 4  # zero points, or minima, of how many groups
    tile = tl.program_id(0)
    step = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    i = tl.arange(0, WIDTH)
    unit = tl.load(row_scale + n)[:, None]
    words_at = (
        words
        + (tile * STEPS + step).to(tl.int64) * (WORDS * BN * WIDTH)
        + tl.arange(0, BN)[:, None] * WIDTH
        + i[None, :]
    )
    out_at = out + n[:, None].to(tl.int64) * K + step * BK + i[None, :]
    spare = tl.zeros((BN, WIDTH), tl.int16)
    for start in tl.static_range(0, BK, WIDTH):
        if BITS == 3 and start == 15 * WIDTH:
            raw = spare
        elif start % (FIELDS * WIDTH) == 0:
            raw = tl.load(words_at + start // (FIELDS * WIDTH) * BN * WIDTH)
            if BITS == 3:
                spare = take_top(spare, raw)
        if start % GROUP == 0:
            if start % (2 * GROUP) == 0:
                pair = tl.load(scales + (step * BK + start) // (2 * GROUP) * FULL + n)
            if start % (PER_WORD * GROUP) == 0:
                more = pair if GRID == MIDDLE else tl.load(zeros + (step * BK + start) // (PER_WORD * GROUP) * FULL + n)
            multiplier, addend = grid_of(pair, more, (step * BK + start) // GROUP, BITS, GRID, DTYPE)
        values = unpack(raw, multiplier, addend, start // WIDTH % FIELDS, BITS, GRID)
        there = (n[:, None] < N) & (step * BK + start + i[None, :] < K)
        tl.store(out_at + start, (values.to(tl.float32) * unit).to(DTYPE), mask=there)


def dequantize_wq(weight: PackedWeight) -> Tensor:
    """The weight [n, k] in its dtype, columns in stored order."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=weight.dtype, device=weight.words.device)
    dequantize_wq_kernel[weight.words.shape[0], weight.words.shape[1]](
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.row_scale,
        out,
        N=n,
        K=k,
        GROUP=weight.group,
        BITS=weight.scheme.bits,
        GRID=weight.grid,
        BN=ROWS,
        BK=weight.columns,
    )
    return out


def linear_decoded(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `linear_wq`, for more than FUSED tokens: the weight decoded, and PyTorch's product."""
    return torch.nn.functional.linear(x, dequantize_wq(weight), bias)


def cost(weight: PackedWeight, tokens: int) -> Cost:
    """What `linear_decoded` reads, writes and computes: the decoded weight is written and read once."""
    n, k = weight.shape
    return Cost(weight.nbytes + 2 * 2 * n * k + 2 * tokens * (n + k), 2 * tokens * n * k)


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship, for layers of a model of 8 billion parameters."""
    for width, columns in COLUMNS.items():
        yield Build(
            name=f"dequantize_wq int{width}:g128:asym fp16 14336x4096",
            kernel=dequantize_wq_kernel,
            arguments={"words": "*i16", "scales": "*i32", "zeros": "*i32", "row_scale": "*fp32", "out": "*fp16"},
            constants={
                "N": 14336,
                "K": 4096,
                "GROUP": 128,
                "BITS": width,
                "GRID": 1,
                "BN": ROWS,
                "BK": columns,
            },
            handled=ROWS * columns,
        )
