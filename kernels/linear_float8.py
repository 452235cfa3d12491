"""linear_float8: activations in fp8 (e4m3) times weights in fp8, or of 4 bits (W8A8 and W4A8 on floats).

Where linear_a8 adds up integers, this adds up floats of 8 bits, which Hopper's tensor cores multiply at the same rate;
GPUs before Ada have none. An activation's outliers cost it less than they cost evenly spaced codes.

- Codes of 4 bits are such floats as they are: alone in the low bits of a byte, v is v * 2^-9, exactly. An AND unpacks
  four. Their zero point is taken from a run's sum, with the sum of the activation's codes.
- The tensor cores keep fewer bits than a float32 of what they add up, so they do it over one product's columns only,
  and the sums of these are added up in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.errors import No
from qcompiler.kernels import linear_a8
from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.packed_float8 import PackedFloat8
from qcompiler.kernels.packed_integers import WIDTH, sums_of
from qcompiler.kernels.packed_weight import ROWS
from qcompiler.kernels.sass import Build
from qcompiler.kernels.split import Config, add_parts, leave_part, parts_of_k
from qcompiler.scheme import QTensor
from qcompiler.target import Accept, Answer, Kernel, bits, channel_or_group, integer_codes, matrix, without


def floats(weight: QTensor) -> Answer:
    """Whether a weight's codes are bytes of e4m3."""
    kind = f"{weight.scheme.code}{weight.scheme.bits}"
    return kind == "fp8" or No(f"{kind} codes, not fp8")


SUITABLE = channel_or_group(32, 64, 128) & matrix() & without("minimum", "boundaries", "permutation")
W4F8 = Kernel("linear_w4f8", "integer_linear", bits(4) & integer_codes() & SUITABLE & without("codebook"))
W8F8 = Kernel("linear_w8f8", "integer_linear", Accept("float8_codes()", floats) & SUITABLE)

LOW = tl.constexpr("and.b32 $0, $1, 0x0f0f0f0f;")
HIGH = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }")


def runs_on(device: Device) -> Answer:
    """Whether a GPU multiplies floats of 8 bits."""
    have = device.capability
    return have >= 89 or No(f"products of fp8 need compute capability 8.9, and this GPU has {have // 10}.{have % 10}")


@triton.jit
def unpack(raw, FIELD: tl.constexpr):
    """The codes in the low or the high bits of int8 words, as floats of 8 bits."""
    ASM: tl.constexpr = HIGH if FIELD else LOW
    codes = tl.inline_asm_elementwise(ASM, "=r,r", [raw], tl.int8, is_pure=True, pack=4)
    return codes.to(tl.float8e4nv, bitcast=True)


@triton.jit
def linear_float8_kernel(
    x,
    words,
    factors,
    zeros,
    token_scale,
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
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Codes x [tokens, K] fp8 times the packed weight [N, K] transposed, plus bias [N], into out [tokens, N].

    Program (i, j, l) takes rows i * BN and on, the j-th part of K, tokens l * BM and on. GROUPED: a run is WIDTH
    columns long, else it is all of K. `token_scale` float32 [tokens]; `sums` float32 [runs, tokens] are those of the
    codes, for 4 bits. `partial` is float32 [SPLIT, tokens of all programs, N filled up].
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
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, first + EACH):
        here = tl.minimum(step, STEPS - 1) if RAGGED else step
        raw = tl.load(words_at + here * (BN * WIDTH))
        for field in tl.static_range(FIELDS):
            mask = there
            if RAGGED:
                mask = there & (step * (WIDTH * FIELDS) + field * WIDTH + i[:, None] < K)
            columns = tl.load(x_at + field * WIDTH, mask=mask, other=0.0)
            values = raw
            if BITS == 4:
                values = unpack(raw, field)
            part = tl.dot(values, columns, tl.zeros((BN, BM), tl.float32))
            if GROUPED:
                run = here * FIELDS + field
                if BITS == 4:
                    counts = m < tokens
                    if RAGGED:
                        counts = counts & (step * FIELDS + field + m * 0 < RUNS)
                    counted = tl.load(sums + run * tokens + m, mask=counts, other=0.0)
                    part = tl.fma(-tl.load(zeros + run * FULL + n)[:, None], counted[None, :], part)
                acc = tl.fma(part, tl.load(factors + run * FULL + n)[:, None], acc)
            else:
                acc += part
        x_at += WIDTH * FIELDS

    if SPLIT > 1:
        SUM: tl.constexpr = BM * FULL
        part_at = partial + m[None, :] * FULL + n[:, None]
        if leave_part(acc, part_at, arrived + tile, split, SUM, SPLIT):
            return
        acc = add_parts(acc, part_at, arrived + tile, SUM, SPLIT)
    if not GROUPED:
        if BITS == 4:
            counted = tl.load(sums + m, mask=m < tokens, other=0.0)
            acc = tl.fma(-tl.load(zeros + n)[:, None], counted[None, :], acc)
        acc = acc * tl.load(factors + n)[:, None]
    acc = acc * tl.load(token_scale + m, mask=m < tokens, other=1.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0)[:, None].to(tl.float32)
    tl.store(out + m[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=there & (n[:, None] < N))


def configure(n: int, steps: int, grouped: bool, tokens: int, device: Device = H200) -> Config:
    """The configuration for a weight of n rows in `steps` tiles each, and `tokens` tokens: linear_a8's, but any sum of
    floats can be split."""
    chosen = linear_a8.configure(n, steps, grouped, tokens, device)
    return replace(chosen, split=parts_of_k(n, steps, device) if tokens <= chosen.tokens else 1)


def linear_float8(
    x: Tensor,
    weight: PackedFloat8,
    token: Sequence[Tensor],
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    config: Config | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Codes x [..., k] float8_e4m3fn times the weight [n, k] transposed, plus bias [n]: `dtype` [..., n].

    `token` is the scale of each token, float32, as `quantize` and norm_quantize give it. `sums` float32 [runs, tokens]
    are those of the codes, for 4 bits; counted here if not given.
    """
    n, k = weight.shape
    tokens = x.numel() // k
    chosen = config or configure(n, weight.words.shape[1], weight.run < k, tokens, device_of(x))
    if weight.zeros is not None and sums is None:
        sums = sums_of(x, weight.run)
    out = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    partial = weight.factors
    if chosen.split > 1:
        partial = x.new_empty((chosen.split, chosen.tokens, weight.factors.shape[1]), dtype=torch.float32)
    linear_float8_kernel[weight.words.shape[0], chosen.split, triton.cdiv(tokens, chosen.tokens)](
        x,
        weight.words,
        weight.factors,
        weight.factors if weight.zeros is None else weight.zeros,
        token[0],
        weight.factors if sums is None else sums,
        out if bias is None else bias,
        partial,
        weight.arrived,
        out,
        tokens,
        N=n,
        K=k,
        GROUPED=weight.run < k,
        BITS=weight.scheme.bits,
        HAS_BIAS=bias is not None,
        BM=chosen.tokens,
        BN=ROWS,
        WIDTH=weight.words.shape[3],
        SPLIT=chosen.split,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return out


def cost(weight: PackedFloat8, tokens: int) -> Cost:
    """What a launch reads, writes and computes; an operation on floats of 8 bits takes half the time of one on 16."""
    n, k = weight.shape
    return Cost(weight.nbytes + tokens * (2 * n + k), tokens * n * k)


ARGUMENTS = {
    "x": "*fp8e4nv",
    "factors": "*fp32",
    "zeros": "*fp32",
    "token_scale": "*fp32",
    "sums": "*fp32",
    "bias": "*fp16",
    "partial": "*fp32",
    "arrived": "*i32",
    "out": "*fp16",
    "tokens": "i32",
}
BUDGET = {4: 2.0, 8: 1.5}  # instructions for a weight, with at most 16 tokens and groups of 128


def build(width: int, run: int, n: int, k: int, tokens: int, device: Device = H200) -> Build:
    """What is compiled for weights of `width` bits and runs of `run` columns (k: one)."""
    columns = (run if run < k else WIDTH) * (8 // width)
    config = configure(n, -(-k // columns), run < k, tokens, device)
    return Build(
        name=f"linear_w{width}f8 run={run if run < k else 'k'} fp8:token:dynamic {n}x{k} M={tokens}",
        kernel=linear_float8_kernel,
        arguments=ARGUMENTS | {"words": "*i8" if width == 4 else "*fp8e4nv"},
        constants={
            "N": n,
            "K": k,
            "GROUPED": run < k,
            "BITS": width,
            "HAS_BIAS": True,
            "BM": config.tokens,
            "BN": ROWS,
            "WIDTH": columns // (8 // width),
            "SPLIT": config.split,
        },
        handled=ROWS * columns,
        budget=BUDGET[width] if tokens <= 16 else 0.0,
        warps=config.warps,
        stages=config.stages,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship, for a layer of a model of 8 billion parameters."""
    if not runs_on(device):
        return
    for tokens in (1, 16, 64, 128):
        yield build(4, 128, 14336, 4096, tokens, device)
        yield build(8, 4096, 14336, 4096, tokens, device)
    yield build(8, 128, 14336, 4096, 16, device)
