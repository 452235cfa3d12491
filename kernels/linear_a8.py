"""linear_a8: activations of 8 bits times weights of 8 or 4, added up in integers (W8A8, W4A8).

The result is that of qc.integer_linear to the last bit. What makes it fast beside being right:

- Tensor cores multiply 8-bit integers at twice the rate of floats, and read half the bytes.
- Codes of 4 bits are signed, and are multiplied while they lie in the high half of a byte: an AND makes four of them,
  no shift brings a sign along. The factor 16 is taken back in the scale, where it changes no bit of a sum.
- A run's sum starts at the bits of 1.5 * 2^23. Read as a float it needs one subtraction, and no conversion, to be the
  sum, and that subtraction takes the share of the activation's zero points too. A weight's zero point is in the
  run's start: what it takes is the sum of the activation's codes, which whoever rounded them has counted. Runs of 128
  columns keep all this below 2^22, and exact.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.packed_integers import MAGIC, WIDTH, PackedIntegers, sums_of
from qcompiler.kernels.packed_weight import ROWS
from qcompiler.kernels.sass import Build
from qcompiler.kernels.split import Config, add_parts, leave_part, parts_of_k, token_block
from qcompiler.rounding import activation_scheme
from qcompiler.target import Accept, Kernel, bits, channel_or_group, integer_codes, k_at_most, matrix, without

SUITABLE = (
    integer_codes()
    & channel_or_group(32, 64, 128)
    & matrix()
    & k_at_most(65536)  # a column adds at most 255 * 128 to a row's sum, of 32 bits; with zero points 255 * 255
    & Accept("(without(zero) | k_at_most(32768))", lambda weight: weight.zero is None or k_at_most(32768)(weight))
    & without("minimum", "codebook", "boundaries", "permutation")
)
W4A8 = Kernel("linear_w4a8", "integer_linear", bits(4) & SUITABLE)
W8A8 = Kernel("linear_w8a8", "integer_linear", bits(8) & SUITABLE)

HIGH = tl.constexpr("and.b32 $0, $1, 0xf0f0f0f0;")
LOW = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0; }")


@triton.jit
def linear_a8_kernel(
    x,
    words,
    factors,
    starts,
    zeros,
    token_scale,
    token_zero,
    sums,
    bias,
    partial,
    arrived,
    out,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPED: tl.constexpr,
    BITS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    SHIFTED: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MAGIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Codes x [tokens, K] int8 times the packed weight [N, K] transposed, plus bias [N], into out [tokens, N].

    Program (i, j, l) takes rows i * BN and on, the j-th part of K, tokens l * BM and on. GROUPED: a run is WIDTH
    columns long, else it is all of K. DYNAMIC: token_scale, and if SHIFTED (asymmetric) token_zero, float32 [tokens],
    are those of each token; else factors and starts hold a static activation's. CENTERED: the weight has no zero
    points; else `sums` int32 [runs, tokens] are those of the codes. `partial` is int32 [SPLIT, tokens of all programs,
    N filled up].
    """
    FIELDS: tl.constexpr = 8 // BITS
    STEPS: tl.constexpr = (K + WIDTH * FIELDS - 1) // (WIDTH * FIELDS)
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    RAGGED: tl.constexpr = STEPS * WIDTH * FIELDS > K or EACH * SPLIT > STEPS
    RUNS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    FULL: tl.constexpr = (N + BN - 1) // BN * BN

    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = split * EACH
    n = tile * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    i = tl.arange(0, WIDTH)
    words_at = words + tile * (STEPS * BN * WIDTH) + tl.arange(0, BN)[:, None] * WIDTH + i[None, :]
    x_at = x + m[None, :] * K + first * (WIDTH * FIELDS) + i[:, None]
    there = m[None, :] < tokens
    scale = tl.full((BM,), 1.0, tl.float32)
    zero = tl.zeros((BM,), tl.int32)
    if DYNAMIC:
        scale = tl.load(token_scale + m, mask=m < tokens, other=1.0)
        if SHIFTED:
            zero = tl.load(token_zero + m, mask=m < tokens, other=0.0).to(tl.int32)

    total = tl.zeros((BN, BM), tl.float32)
    acc = tl.zeros((BN, BM), tl.int32)
    for step in tl.range(first, first + EACH):
        here = tl.minimum(step, STEPS - 1) if RAGGED else step
        raw = tl.load(words_at + here * (BN * WIDTH))
        for field in tl.static_range(FIELDS):
            mask = there
            if RAGGED:
                mask = there & (step * (WIDTH * FIELDS) + field * WIDTH + i[:, None] < K)
            columns = tl.load(x_at + field * WIDTH, mask=mask, other=0)
            codes = raw
            if BITS == 4 and field == 0:
                codes = tl.inline_asm_elementwise(LOW, "=r,r", [raw], tl.int8, is_pure=True, pack=4)
            elif BITS == 4:
                codes = tl.inline_asm_elementwise(HIGH, "=r,r", [raw], tl.int8, is_pure=True, pack=4)
            if GROUPED:
                run = here * FIELDS + field
                factor = tl.load(factors + run * FULL + n)[:, None] * scale[None, :]
                base = tl.full((BN, 1), MAGIC, tl.int32)
                if SHIFTED:
                    share = tl.load(starts + run * FULL + n)[:, None]
                    base = base + share * zero[None, :] if DYNAMIC else base - share
                begun = tl.full((BN, BM), MAGIC, tl.int32)
                if not CENTERED:
                    counts = m < tokens
                    if RAGGED:
                        counts = counts & (run + m * 0 < RUNS)
                    counted = tl.load(sums + run * tokens + m, mask=counts, other=0)
                    begun -= tl.load(zeros + run * FULL + n)[:, None] * counted[None, :]
                summed = tl.dot(codes, columns, begun, out_dtype=tl.int32)
                total += (summed.to(tl.float32, bitcast=True) - base.to(tl.float32, bitcast=True)) * factor
            else:
                acc = tl.dot(codes, columns, acc, out_dtype=tl.int32)
        x_at += WIDTH * FIELDS

    if SPLIT > 1:
        SUM: tl.constexpr = BM * FULL
        part_at = partial + m[None, :] * FULL + n[:, None]
        if leave_part(acc, part_at, arrived + tile, split, SUM, SPLIT):
            return
        acc = add_parts(acc, part_at, arrived + tile, SUM, SPLIT)
    if not GROUPED:
        if not CENTERED:
            counted = tl.load(sums + m, mask=m < tokens, other=0)
            acc -= tl.load(zeros + n)[:, None] * counted[None, :]
        if SHIFTED:
            share = tl.load(starts + n)[:, None]
            acc += -(share * zero[None, :]) if DYNAMIC else share
        total = acc.to(tl.float32) * (tl.load(factors + n)[:, None] * scale[None, :])
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0)[:, None].to(tl.float32)
    tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=there & (n[:, None] < N))


def configure(n: int, steps: int, grouped: bool, tokens: int, device: Device = H200) -> Config:
    """The configuration for a weight of n rows in `steps` tiles each, and `tokens` tokens, by rule.

    Only a single run can be split: floats must be added up in the order of the meaning.
    """
    block = token_block(tokens, 64 if grouped else 128)
    split = parts_of_k(n, steps, device) if tokens <= block and not grouped else 1
    crowded = block == 128 or (block == 64 and grouped)  # for the registers of 4 warps
    return Config(block, split, warps=8 if crowded else 4, stages=4 if block <= 32 else 3)


def linear_a8(
    x: Tensor,
    weight: PackedIntegers,
    token: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    config: Config | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Codes x [..., k] int8, less half the levels, times the weight [n, k] transposed, plus bias [n]: `dtype` [..., n].

    `token` is the scale, and of an asymmetric activation the zero point less half the levels too, of each token, both
    float32, as norm_quantize gives them; empty for a static activation. `sums` int32 [runs, tokens] are those of the
    codes, for a weight with zero points; counted here if not given.
    """
    n, k = weight.shape
    tokens = x.numel() // k
    grouped, kind = weight.run < k, activation_scheme(weight.activation)
    chosen = config or configure(n, weight.words.shape[1], grouped, tokens, device_of(x))
    out = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    if weight.zeros is not None and sums is None:
        sums = sums_of(x, weight.run)
    partial = weight.starts
    if chosen.split > 1:
        partial = x.new_empty((chosen.split, chosen.tokens, weight.starts.shape[1]), dtype=torch.int32)
    linear_a8_kernel[weight.words.shape[0], chosen.split, triton.cdiv(tokens, chosen.tokens)](
        x,
        weight.words,
        weight.factors,
        weight.starts,
        weight.starts if weight.zeros is None else weight.zeros,
        token[0] if token else weight.factors,
        token[-1] if token else weight.factors,
        weight.starts if sums is None else sums,
        out if bias is None else bias,
        partial,
        weight.arrived,
        out,
        tokens,
        N=n,
        K=k,
        GROUPED=grouped,
        BITS=weight.scheme.bits,
        DYNAMIC=kind.dynamic,
        SHIFTED=not kind.symmetric,
        CENTERED=weight.zeros is None,
        HAS_BIAS=bias is not None,
        MAGIC=MAGIC,
        BM=chosen.tokens,
        BN=ROWS,
        WIDTH=weight.words.shape[3],
        SPLIT=chosen.split,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=False,  # a product and a sum are two roundings in the meaning
    )
    return out


def cost(weight: PackedIntegers, tokens: int) -> Cost:
    """What a launch reads, writes and computes; an operation on 8-bit integers takes half the time of one on floats."""
    n, k = weight.shape
    return Cost(weight.nbytes + tokens * (2 * n + k), tokens * n * k)


ARGUMENTS = {
    "x": "*i8",
    "words": "*i8",
    "factors": "*fp32",
    "starts": "*i32",
    "zeros": "*i32",
    "token_scale": "*fp32",
    "token_zero": "*fp32",
    "sums": "*i32",
    "bias": "*fp16",
    "partial": "*i32",
    "arrived": "*i32",
    "out": "*fp16",
    "tokens": "i32",
}
BUDGET = {4: 2.0, 8: 0.0}  # instructions for a weight, with at most 16 tokens and groups of 128


def build(
    width: int, run: int, activation: str, n: int, k: int, tokens: int, device: Device = H200, zeros: bool = False
) -> Build:
    """What is compiled for weights of `width` bits, perhaps with zero points, and runs of `run` columns (k: one)."""
    columns = (run if run < k else WIDTH) * (8 // width)
    config = configure(n, -(-k // columns), run < k, tokens, device)
    kind = activation_scheme(activation)
    weight = f"linear_w{width}a8{' asym' if zeros else ''} run={run if run < k else 'k'}"
    return Build(
        name=f"{weight} {activation} {n}x{k} M={tokens}",
        kernel=linear_a8_kernel,
        arguments=ARGUMENTS,
        constants={
            "N": n,
            "K": k,
            "GROUPED": run < k,
            "BITS": width,
            "DYNAMIC": kind.dynamic,
            "SHIFTED": not kind.symmetric,
            "CENTERED": not zeros,
            "HAS_BIAS": True,
            "MAGIC": MAGIC,
            "BM": config.tokens,
            "BN": ROWS,
            "WIDTH": columns // (8 // width),
            "SPLIT": config.split,
        },
        handled=ROWS * columns,
        budget=BUDGET[width] if tokens <= 16 else 0.0,
        warps=config.warps,
        stages=config.stages,
        fusion=False,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship, for a layer of a model of 8 billion parameters."""
    for tokens in (1, 16, 64, 128):
        yield build(4, 128, "int8:token:dynamic", 14336, 4096, tokens, device)
        yield build(8, 4096, "int8:token:dynamic", 14336, 4096, tokens, device)
    yield build(4, 128, "int8:g128:asym", 14336, 4096, 16, device)
    yield build(4, 128, "int8:token:asym:dynamic", 14336, 4096, 16, device)
    yield build(8, 128, "int8:g128:asym", 14336, 4096, 16, device)
    for activation in ("int8:token:dynamic", "int8:token:asym:dynamic", "int8:g128:asym"):
        for tokens in (1, 16):
            yield build(4, 128, activation, 14336, 4096, tokens, device, zeros=True)
    yield build(8, 4096, "int8:token:dynamic", 14336, 4096, 16, device, zeros=True)
