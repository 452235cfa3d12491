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

from qcompiler.kernels.cost import H200, Cost, Device
from qcompiler.kernels.sass import Build
from qcompiler.rounding import activation_scheme, group_size


@triton.jit
def to_nearest(x):
    """x, float32 and less than 2^22, rounded to whole numbers, ties to even: beside this no other bits fit."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def row_of(x, residual, at, mask, HAS_RESIDUAL: tl.constexpr):
    """Channels `at` of the sum of x and residual, rounded as the sum is stored, in float32."""
    values = tl.load(x + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        values = (values.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(values.dtype)
    return values.to(tl.float32)


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
):
    """Row `program` of x [tokens, WIDTH]: codes [tokens, WIDTH] int8, of which LEVELS / 2 was taken away.

    Weight, bias, scale and zero [WIDTH] are in the order of what is stored: place j holds channel order[j].
    """
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    there = j < WIDTH
    x += token * WIDTH
    residual += token * WIDTH
    row = row_of(x, residual, j, there, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        tl.store(added + token * WIDTH + j, row.to(added.dtype.element_ty), mask=there)
    mean = 0.0
    if CENTERED:
        mean = tl.sum(row, axis=0) / WIDTH
    apart = tl.where(there, row - mean, 0.0)
    spread = tl.rsqrt(tl.sum(apart * apart, axis=0) / WIDTH + eps)
    if REORDERED:
        row = row_of(x, residual, tl.load(order + j, mask=there, other=0), there, HAS_RESIDUAL)
    normed = (row - mean) * spread * tl.load(weight + j, mask=there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias + j, mask=there, other=0.0).to(tl.float32)
    normed = normed.to(x.dtype.element_ty).to(tl.float32)  # what the norm alone would store

    middle = LEVELS // 2
    if DYNAMIC:
        highest = tl.maximum(tl.max(tl.where(there, normed, 0.0), axis=0), 0.0)
        lowest = tl.minimum(tl.min(tl.where(there, normed, 0.0), axis=0), 0.0)
        if SYMMETRIC:
            step = tl.div_rn(tl.maximum(highest, -lowest), LEVELS // 2 - 1.0)
        else:
            step = tl.div_rn(highest - lowest, LEVELS - 1.0)
        step = tl.where(step > 0, step, 1.0)
        shift = middle * 1.0
        if not SYMMETRIC:
            shift = tl.minimum(to_nearest(tl.div_rn(-lowest, step)), LEVELS - 1.0)
            tl.store(token_zero + token, shift - middle)
        tl.store(token_scale + token, step)
        steps = tl.div_rn(normed, tl.broadcast_to(step, normed.shape))
    else:
        steps = tl.div_rn(normed, tl.load(scale + j, mask=there, other=1.0))
        shift = tl.load(zero + j, mask=there, other=0.0)
    steps = tl.minimum(tl.maximum(steps, -2.0 * LEVELS), 2.0 * LEVELS)  # so that they can be rounded; clipped anyway
    code = tl.minimum(tl.maximum(to_nearest(steps) + shift, 0.0), LEVELS - 1.0)
    tl.store(codes + token * WIDTH + j, (code - middle).to(tl.int8), mask=there)


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
        norm_quantize_kernel[tokens,](
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
    """So many that a thread holds 16 channels: each of its loads is 16 bytes long, and there are two."""
    return max(1, min(16, block // 512))


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
        | {"order": "*i32", "codes": "*i8", "eps": "fp32"},
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
