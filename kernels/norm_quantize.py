"""norm_quantize: a norm that adds the residual first, stores its channels in another order, and rounds them, in one.

What stands between two products of a transformer reads and writes as much as it must and no more: x (and the residual)
come in, codes of 8 bits or fewer go out, the sum of both for the next residual too. RPTQ's order costs a gather from
the processor's own cache, where the row already is; nothing is gathered in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.packed_integers import MAGIC
from qcompiler.kernels.sass import Build
from qcompiler.rounding import activation_scheme, group_size


@triton.jit
def row_of(x, residual, at, mask, HAS_RESIDUAL: tl.constexpr):
    """Channels `at` of the sum of x and residual, rounded as the sum is stored, in float32."""
    values = tl.load(x + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        values = (values.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(values.dtype)
    return values.to(tl.float32)


@triton.jit
def divide(x, y, inverse):
    """x / y rounded once, given 1 / y rounded once: the remainder of the first guess mends it."""
    guess = x * inverse
    return tl.fma(tl.fma(-guess, y, x), inverse, guess)


@triton.jit
def parameters(
    weight,
    bias,
    order,
    scale,
    zero,
    j,
    there,
    HAS_BIAS: tl.constexpr,
    REORDERED: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """What belongs to place j: factor, shift, channel; step, its inverse, and middle, of a static activation."""
    factor = tl.load(weight + j, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + j, mask=there, other=0.0).to(tl.float32) if HAS_BIAS else factor
    channel = tl.load(order + j, mask=there, other=0) if REORDERED else j
    if DYNAMIC:
        return factor, shift, channel, factor, factor, factor
    step = tl.load(scale + j, mask=there, other=1.0)
    middle = tl.load(zero + j, mask=there, other=0.0)
    return factor, shift, channel, step, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step), middle


@triton.jit
def norm_quantize_kernel(
    x,
    residual,
    weight,
    bias,
    order,
    scale,
    zero,
    added,
    codes,
    token_scale,
    token_zero,
    tokens,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REORDERED: tl.constexpr,
    LEVELS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MAGIC: tl.constexpr,
):
    """Rows program, program + programs, ... of x [tokens, WIDTH]: codes [tokens, WIDTH] int8, less LEVELS / 2.

    Weight, bias, scale and zero [WIDTH] are in the order of what is stored: place j holds channel order[j]. Those of
    rows that are not too long stay in registers from row to row.
    """
    HALF: tl.constexpr = LEVELS // 2
    RESIDENT: tl.constexpr = BLOCK <= 4096
    j = tl.arange(0, BLOCK)
    there = j < WIDTH
    if RESIDENT:
        factor, shift, channel, step, inverse, middle = parameters(
            weight, bias, order, scale, zero, j, there, HAS_BIAS, REORDERED, DYNAMIC
        )
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        begin = tl.cast(token, tl.int64) * WIDTH
        row = row_of(x + begin, residual + begin, j, there, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(added + begin + j, row.to(added.dtype.element_ty), mask=there)
        mean = tl.sum(row, axis=0) / WIDTH if CENTERED else 0.0
        apart = tl.where(there, row - mean, 0.0)
        spread = tl.rsqrt(tl.sum(apart * apart, axis=0) / WIDTH + eps)
        if not RESIDENT:
            factor, shift, channel, step, inverse, middle = parameters(
                weight, bias, order, scale, zero, j, there, HAS_BIAS, REORDERED, DYNAMIC
            )
        if REORDERED:
            apart = row_of(x + begin, residual + begin, channel, there, HAS_RESIDUAL) - mean
        normed = apart * spread * factor
        if HAS_BIAS:
            normed += shift
        normed = normed.to(x.dtype.element_ty).to(tl.float32)  # what the norm alone would store

        if DYNAMIC:
            highest = tl.maximum(tl.max(tl.where(there, normed, 0.0), axis=0), 0.0)
            lowest = tl.minimum(tl.min(tl.where(there, normed, 0.0), axis=0), 0.0)
            if SYMMETRIC:
                size = tl.div_rn(tl.maximum(highest, -lowest), HALF - 1.0)
            else:
                size = tl.div_rn(highest - lowest, LEVELS - 1.0)
            size = tl.where(size > 0, size, 1.0)
            one_over = tl.div_rn(1.0, size)
            center = HALF * 1.0
            if not SYMMETRIC:
                # Adding and taking away 1.5 * 2^23 leaves whole numbers, ties rounded to even.
                center = tl.minimum((tl.div_rn(-lowest, size) + 12582912.0) - 12582912.0, LEVELS - 1.0)
                tl.store(token_zero + token, center - HALF)
            tl.store(token_scale + token, size)
        else:
            size, one_over, center = step, inverse, middle
        steps = divide(normed, size, one_over)
        steps = tl.minimum(tl.maximum(steps, -center), (LEVELS - 1) - center)
        # The same sum as bits: its last ones are the whole number.
        whole = (steps + 12582912.0).to(tl.int32, bitcast=True) - MAGIC
        tl.store(codes + begin + j, (whole + (center - HALF).to(tl.int32)).to(tl.int8), mask=there)


@dataclass(frozen=True, eq=False)
class NormQuantize:
    """A norm with its parameters laid out for the kernel; call it with x [tokens, width] and perhaps a residual.

    `weight` and `bias` [width] are in stored order, `order` int32 [width] or None; `scale` and `zero` float32 [width],
    one for each stored channel, are None for a dynamic scheme.
    """

    kind: str
    eps: float
    scheme: str
    weight: Tensor
    bias: Tensor | None = None
    order: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        order: Tensor | None,
        grid: tuple[Tensor, ...],
        *,
        kind: str,
        eps: float,
        scheme: str,
    ) -> "NormQuantize":
        """From what qc.reordered_norm and qc.fake_quantize are given: weight and bias in the order of x."""
        width = weight.shape[0]
        size = group_size(activation_scheme(scheme), width)
        spread = [part.float().reshape(-1).repeat_interleave(size)[:width].contiguous() for part in grid]
        if len(spread) == 1:
            spread.append(torch.full_like(spread[0], activation_scheme(scheme).levels >> 1))
        chosen = slice(None) if order is None else order.long()
        return cls(
            kind,
            eps,
            scheme,
            weight[chosen].contiguous(),
            None if bias is None else bias[chosen].contiguous(),
            None if order is None else order.int(),
            *spread,
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> "Quantized":
        """Codes of the norm of x (plus residual), both [tokens, width], contiguous, float16, bfloat16 or float32."""
        scheme = activation_scheme(self.scheme)
        tokens, width = x.shape
        codes = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
        added = torch.empty_like(x) if residual is not None else None
        scale = x.new_empty(tokens, dtype=torch.float32) if scheme.dynamic else None
        zero = torch.empty_like(scale) if scale is not None and not scheme.symmetric else None
        block = triton.next_power_of_2(width)
        norm_quantize_kernel[min(tokens, programs(block, device_of(x))),](
            x,
            x if residual is None else residual,
            self.weight,
            self.weight if self.bias is None else self.bias,
            codes if self.order is None else self.order,
            self.weight if self.scale is None else self.scale,
            self.weight if self.zero is None else self.zero,
            x if added is None else added,
            codes,
            codes if scale is None else scale,
            codes if zero is None else zero,
            tokens,
            self.eps,
            WIDTH=width,
            BLOCK=block,
            CENTERED=self.kind == "layer",
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=self.bias is not None,
            REORDERED=self.order is not None,
            LEVELS=scheme.levels,
            DYNAMIC=scheme.dynamic,
            SYMMETRIC=scheme.symmetric,
            MAGIC=MAGIC,
            num_warps=warps(block),
        )
        return Quantized(codes, scale, zero, added)

    def cost(self, tokens: int, residual: bool = False) -> Cost:
        """What a call reads and writes: 2 bytes in and 1 out, 4 more with a residual."""
        return Cost(tokens * self.weight.shape[0] * (3 + 4 * residual), 0)


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a call gives.

    `codes` int8 [tokens, width], less half the levels; of a dynamic scheme `scale`, and `zero` less half the levels too
    unless symmetric, float32 [tokens]; `added`, the sum of x and residual, if there was one.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    added: Tensor | None


def warps(block: int) -> int:
    """So many that a thread holds 8 channels, which is one load, and what belongs to them."""
    return max(1, min(16, block // 256))


def programs(block: int, device: Device) -> int:
    """As many as run at once: a processor holds 64 warps, of which registers leave room for half."""
    return device.processors * max(1, 32 // warps(block))


def build(kind: str, scheme: str, width: int, residual: bool, reordered: bool) -> Build:
    """What is compiled for a norm of `width` channels in bfloat16."""
    how = activation_scheme(scheme)
    block = triton.next_power_of_2(width)
    extra = f"{' + residual' if residual else ''}{' reordered' if reordered else ''}"
    return Build(
        name=f"norm_quantize {kind} {scheme} {width}{extra}",
        kernel=norm_quantize_kernel,
        arguments=dict.fromkeys(("x", "residual", "weight", "bias", "added"), "*bf16")
        | dict.fromkeys(("scale", "zero", "token_scale", "token_zero"), "*fp32")
        | {"order": "*i32", "codes": "*i8", "tokens": "i32", "eps": "fp32"},
        constants={
            "WIDTH": width,
            "BLOCK": block,
            "CENTERED": kind == "layer",
            "HAS_RESIDUAL": residual,
            "HAS_BIAS": kind == "layer",
            "REORDERED": reordered,
            "LEVELS": how.levels,
            "DYNAMIC": how.dynamic,
            "SYMMETRIC": how.symmetric,
            "MAGIC": MAGIC,
        },
        handled=width,
        warps=warps(block),
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship: the norms of RPTQ on OPT, and of models with RMSNorm."""
    for width in (4096, 8192):
        yield build("layer", "int8:g128:asym", width, residual=False, reordered=True)
        yield build("rms", "int8:token:dynamic", width, residual=True, reordered=False)
        yield build("rms", "int8:token:asym:dynamic", width, residual=True, reordered=True)
