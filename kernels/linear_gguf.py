"""linear_gguf: a float activation times a weight in GGUF's Q4_K or Q6_K, after an offline repack (packed_blocks.py).

Both levels of the scales stay: decoded to 16 bits when the weight is packed, scales and minima would cost 5.0 bits a
weight instead of 4.625, and 7.0 instead of 6.625. Two of them are decoded at once, by one AND, one addition and one
product in the 16-bit floats of a register, for a group's row; what a GPU has time for in between.

Q4_0, Q4_1 and Q8_0 have one level, and are linear_wq's.
"""

from collections.abc import Iterator
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels import linear_wq
from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.packed_blocks import KINDS, SUPERBLOCK, Kind, PackedBlocks, suits
from qcompiler.kernels.packed_weight import ROWS
from qcompiler.kernels.planes import MIDDLE, join_six, unpack
from qcompiler.kernels.sass import Build
from qcompiler.kernels.split import Config, add_parts, leave_part, most_registers, room_for, store_sums
from qcompiler.target import Accept, Kernel, matrix, without

ACCEPTS = matrix() & without("zero", "codebook", "boundaries", "permutation") & Accept("k_quant()", suits)
KERNEL = Kernel("linear_gguf", "linear", ACCEPTS)

# $1 words of codes, $2 shift, $3 makes floats of them, $4 takes away what that added, $5 steps: two codes, in bytes 0
# and 2 after the shift, times both steps.
DECODE_F16 = tl.constexpr(
    "{ .reg .b32 t; shr.b32 t, $1, $2; and.b32 t, t, 0x00ff00ff; or.b32 t, t, $3; add.rn.f16x2 t, t, $4;"
    " mul.rn.f16x2 $0, t, $5; }"
)
DECODE_BF16 = tl.constexpr(
    "{ .reg .b32 t, u; shr.b32 t, $1, $2; and.b32 t, t, 0x00ff00ff; fma.rn.bf16x2 t, t, $3, $4;"
    " mov.b32 u, 0x80008000; fma.rn.bf16x2 $0, t, $5, u; }"
)
# What they are given as $3 and $4: for scales in the low half and minima in the high one, or for signed scales, stored
# plus 128, in both. In float16 a code in the low bits of 0x6400 is 1024 more, and of 0x4000 it is 2^-9 of it and 2 more
# (what a scale is applied to is smaller than what a minimum is: packed_blocks.WORTH). In bfloat16 a code alone is a
# number below the normal ones, and times 2^125 it is 2^-8 of it.
MINIMA_F16 = tl.constexpr((0x40006400, 0xC000E400 - (1 << 32)))
SIGNED_F16 = tl.constexpr((0x64006400, 0xE480E480 - (1 << 32)))
MINIMA_BF16 = tl.constexpr((0x7E007E00, 0x80008000 - (1 << 32)))
SIGNED_BF16 = tl.constexpr((0x7E007E00, 0xBF00BF00 - (1 << 32)))


@triton.jit
def decode(words, steps, PLACE: tl.constexpr, MINIMA: tl.constexpr, HALF: tl.constexpr):
    """Pairs of 16-bit floats from words of 8-bit codes, [n] each: bytes PLACE and PLACE + 2, times a pair of steps."""
    F16: tl.constexpr = MINIMA_F16 if MINIMA else SIGNED_F16
    BF16: tl.constexpr = MINIMA_BF16 if MINIMA else SIGNED_BF16
    CONSTANTS: tl.constexpr = F16 if HALF else BF16
    ASM: tl.constexpr = DECODE_F16 if HALF else DECODE_BF16
    shift = tl.full(words.shape, 8 * PLACE, tl.int32)
    raised = tl.full(words.shape, CONSTANTS[0], tl.int32)
    taken = tl.full(words.shape, CONSTANTS[1], tl.int32)
    arguments = (words, shift, raised, taken, steps)
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r,r,r", arguments, tl.int32, is_pure=True, pack=1)


@triton.jit
def low_of(pair, DTYPE: tl.constexpr):
    """The float in the low half of int32 words."""
    return pair.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def high_of(pair, DTYPE: tl.constexpr):
    """The float in the high half of int32 words."""
    return (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def linear_gguf_kernel(
    x,
    words,
    inner,
    outer,
    row_scale,
    bias,
    partial,
    arrived,
    out,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    MINIMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """x [tokens, K] times the packed weight [N, K] transposed, plus bias [N], into out [tokens, N].

    Programs and `partial` as those of linear_wq_kernel. A step of BK columns, a superblock, is one or more cells; a
    plane of a cell is a group.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    WORDS: tl.constexpr = 3 if BITS == 6 else 1
    PLANES: tl.constexpr = 8 if BITS == 6 else 4
    WIDTH: tl.constexpr = 16 if BITS == 6 else 32
    CELL: tl.constexpr = PLANES * WIDTH
    FIELDS: tl.constexpr = 16 // BITS
    CODES: tl.constexpr = 2 if MINIMA else 4  # groups whose codes of the second level share a word
    STEPS: tl.constexpr = K // BK
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    RAGGED: tl.constexpr = EACH * SPLIT > STEPS
    FULL: tl.constexpr = (N + BN - 1) // BN * BN

    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = split * EACH
    n = tile * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    i = tl.arange(0, WIDTH)
    words_at = words + tile * (K // CELL * WORDS * BN * WIDTH) + tl.arange(0, BN)[:, None] * WIDTH + i[None, :]
    x_at = x + m[None, :] * K + first * BK + i[:, None]
    there = m[None, :] < tokens
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, first + EACH):
        here = tl.minimum(step, STEPS - 1) if RAGGED else step
        mask = there & (step < STEPS) if RAGGED else there
        steps = tl.load(outer + here * FULL + n)
        for start in tl.static_range(0, BK, WIDTH):
            cell_at = words_at + (here * (BK // CELL) + start // CELL) * (WORDS * BN * WIDTH)
            if start % CELL == 0:
                raw = tl.load(cell_at)
                word0 = raw
            if BITS == 6 and start % CELL == 2 * WIDTH:
                raw = tl.load(cell_at + BN * WIDTH)
                word1 = raw
            if BITS == 6 and start % CELL == 4 * WIDTH:
                raw = tl.load(cell_at + 2 * BN * WIDTH)
                word2 = raw
            if BITS == 6 and start % CELL == 6 * WIDTH:
                raw = join_six(word0, word2, 6)
            if BITS == 6 and start % CELL == 7 * WIDTH:
                raw = join_six(word1, word2, 7)
            if start % (CODES * WIDTH) == 0:
                codes = tl.load(inner + (here * (BK // (CODES * WIDTH)) + start // (CODES * WIDTH)) * FULL + n)
            if MINIMA:
                both = decode(codes, steps, start // WIDTH % 2, MINIMA, HALF)
                multiplier, addend = low_of(both, DTYPE), high_of(both, DTYPE)
            else:
                if start % (2 * WIDTH) == 0:
                    both = decode(codes, steps, start // WIDTH % 4 // 2, MINIMA, HALF)
                multiplier = low_of(both, DTYPE) if start % (2 * WIDTH) == 0 else high_of(both, DTYPE)
                middle = tl.full(multiplier.shape, 1 << (BITS - 1), tl.int16).to(DTYPE, bitcast=True)
                addend = -(middle * multiplier)
            columns = tl.load(x_at + start, mask=mask, other=0.0)
            # Both planes that were put together from several words are in the low bits of theirs.
            if start % CELL < 6 * WIDTH:
                values = unpack(raw, multiplier, addend, start % CELL // WIDTH % FIELDS, BITS, MIDDLE)
            else:
                values = unpack(raw, multiplier, addend, 0, BITS, MIDDLE)
            acc = tl.dot(values, columns, acc)
        x_at += BK
    if SPLIT > 1:
        SUM: tl.constexpr = BM * FULL
        part_at = partial + m[None, :] * FULL + n[:, None]
        if leave_part(acc, part_at, arrived + tile, split, SUM, SPLIT):
            return
        acc = add_parts(acc, part_at, arrived + tile, SUM, SPLIT)
    store_sums(acc, row_scale, bias, out, m, n, tokens, N, HAS_BIAS)


def configure(n: int, k: int, bits: int, tokens: int, device: Device = H200) -> Config:
    """As linear_wq's, of steps of a superblock."""
    chosen = linear_wq.configure(n, k, SUPERBLOCK, bits, tokens, device)
    crowded = bits == 6 and chosen.tokens == 64 and device.capability < 90  # for the registers of 4 warps
    return replace(chosen, warps=8) if crowded else chosen


def constants(shape: tuple[int, int], kind: Kind, config: Config) -> dict[str, int]:
    """What a launch fixes."""
    n, k = shape
    fixed = {"N": n, "K": k, "BITS": kind.bits, "MINIMA": kind.minima}
    return fixed | {"BM": config.tokens, "BN": ROWS, "BK": SUPERBLOCK, "SPLIT": config.split}


def linear_gguf(x: Tensor, weight: PackedBlocks, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x [..., k], contiguous, in the weight's dtype, times the weight [n, k] transposed, plus bias [n]: [..., n]."""
    n, k = weight.shape
    tokens = x.numel() // k
    chosen = config or configure(n, k, weight.kind.bits, tokens, device_of(x))
    tiles = weight.words.shape[0]
    out, partial = room_for(x, n, tiles, chosen)
    linear_gguf_kernel[tiles, chosen.split, triton.cdiv(tokens, chosen.tokens)](
        x,
        weight.words,
        weight.inner,
        weight.outer,
        weight.row_scale,
        out if bias is None else bias,
        partial,
        weight.arrived,
        out,
        tokens,
        HAS_BIAS=bias is not None,
        **constants(weight.shape, weight.kind, chosen),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        maxnreg=most_registers(device_of(x)),
    )
    return out


def cost(weight: PackedBlocks, tokens: int, device: Device = H200) -> Cost:
    """What a launch reads, writes and computes."""
    n, k = weight.shape
    config = configure(n, k, weight.kind.bits, tokens, device)
    parts = 2 * 4 * config.split * tokens * n if config.split > 1 else 0
    return Cost(weight.nbytes + 2 * tokens * (n + k) + parts, 2 * tokens * n * k)


ARGUMENTS = {name: kind for name, kind in linear_wq.ARGUMENTS.items() if name not in ("scales", "zeros")}
BUDGET = {"Q4_K": 3.0, "Q6_K": 4.5}  # instructions for a weight, with at most 16 tokens


def build(kind: Kind, n: int, k: int, tokens: int, dtype: str = "fp16", device: Device = H200) -> Build:
    """What is compiled for a weight [n, k] and `tokens` tokens."""
    config = configure(n, k, kind.bits, tokens, device)
    return Build(
        name=f"linear_gguf {kind.name} {dtype} {n}x{k} M={tokens}",
        kernel=linear_gguf_kernel,
        arguments=ARGUMENTS | {"inner": "*i32", "outer": "*i32"} | dict.fromkeys(("x", "bias", "out"), f"*{dtype}"),
        constants={"HAS_BIAS": True, **constants((n, k), kind, config)},
        handled=ROWS * SUPERBLOCK,
        budget=BUDGET[kind.name] if tokens <= 16 else 0.0,
        warps=config.warps,
        stages=config.stages,
        registers=most_registers(device),
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship, for layers of a model of 8 billion parameters."""
    for kind in KINDS:
        for tokens in (1, 16, 32, 64, 128):
            yield build(kind, 14336, 4096, tokens, device=device)
        yield build(kind, 14336, 4096, 16, "bf16", device)
        yield build(kind, 4096, 4096, 16, device=device)
