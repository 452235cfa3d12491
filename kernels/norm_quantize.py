"""norm_quantize: a norm that adds the residual first, stores its channels in another order, and rounds them, in one.

What stands between two products of a transformer reads and writes as much as it must and no more: x (and the residual)
come in, codes of 8 bits or fewer go out, the sum of both for the next residual too. RPTQ's order costs a gather from
the processor's own cache, where the row already is; nothing is gathered in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.quantize import Quantized, constants, grid_of_channels, programs, store_codes, warps_of
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
    """What belongs to place j: factor, shift, channel; and the grid of a static activation."""
    factor = tl.load(weight + j, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + j, mask=there, other=0.0).to(tl.float32) if HAS_BIAS else factor
    channel = tl.load(order + j, mask=there, other=0) if REORDERED else j
    grid = (factor, factor, factor) if DYNAMIC else grid_of_channels(scale, zero, j, there)
    return factor, shift, channel, grid


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
    sums,
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
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    MAGIC: tl.constexpr,
):
    """Rows program, program + programs, ... of x [tokens, WIDTH]: codes [tokens, WIDTH], and sums, as `store_codes`.

    Weight, bias, scale and zero [WIDTH] are in the order of what is stored: place j holds channel order[j]. Those of
    rows that are not too long stay in registers from row to row.
    """
    RESIDENT: tl.constexpr = BLOCK <= 4096
    j = tl.arange(0, BLOCK)
    there = j < WIDTH
    if RESIDENT:
        factor, shift, channel, grid = parameters(
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
            factor, shift, channel, grid = parameters(
                weight, bias, order, scale, zero, j, there, HAS_BIAS, REORDERED, DYNAMIC
            )
        if REORDERED:
            apart = row_of(x + begin, residual + begin, channel, there, HAS_RESIDUAL) - mean
        normed = apart * spread * factor
        if HAS_BIAS:
            normed += shift
        normed = normed.to(x.dtype.element_ty).to(tl.float32)  # what the norm alone would store
        store_codes(
            normed,
            there,
            begin + j,
            0,
            token,
            tokens,
            grid,
            codes,
            token_scale,
            token_zero,
            sums,
            LEVELS,
            DYNAMIC,
            SYMMETRIC,
            RUN,
            RUNS,
            MAGIC,
        )


def spread(grid: Sequence[Tensor], scheme: str, width: int) -> list[Tensor]:
    """Scale and zero point of a static grid for each of `width` channels, float32; of a dynamic one nothing."""
    kind = activation_scheme(scheme)
    size = group_size(kind, width)
    parts = [part.float().reshape(-1).repeat_interleave(size)[:width].contiguous() for part in grid]
    if len(parts) == 1:
        parts.append(torch.full_like(parts[0], kind.levels >> 1))
    return parts


@dataclass(frozen=True, eq=False)
class NormQuantize:
    """A norm with its parameters laid out for the kernel; call it with x [tokens, width] and perhaps a residual.

    `weight` and `bias` [width] are in stored order, `order` int32 [width] or None; `scale` and `zero` float32 [width],
    one for each stored channel, are None for a dynamic scheme. `run` columns' codes are summed up; 0 is none.
    """

    kind: str
    eps: float
    scheme: str
    weight: Tensor
    bias: Tensor | None = None
    order: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    run: int = 0

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
        run: int = 0,
    ) -> "NormQuantize":
        """From what qc.reordered_norm and qc.fake_quantize are given: weight and bias in the order of x."""
        scale, zero = spread(grid, scheme, weight.shape[0]) or (None, None)
        chosen = slice(None) if order is None else order.long()
        return cls(
            kind,
            eps,
            scheme,
            weight[chosen].contiguous(),
            None if bias is None else bias[chosen].contiguous(),
            None if order is None else order.int(),
            scale,
            zero,
            run,
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> "Quantized":
        """Codes of the norm of x (plus residual), both [tokens, width], contiguous, float16, bfloat16 or float32."""
        tokens, width = x.shape
        found = Quantized.room(x, self.scheme, self.run)
        added = torch.empty_like(x) if residual is not None else None
        norm_quantize_kernel[min(tokens, programs(width, device_of(x))),](
            x,
            x if residual is None else residual,
            self.weight,
            self.weight if self.bias is None else self.bias,
            found.codes if self.order is None else self.order,
            self.weight if self.scale is None else self.scale,
            self.weight if self.zero is None else self.zero,
            x if added is None else added,
            *found.outputs(),
            tokens,
            self.eps,
            CENTERED=self.kind == "layer",
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=self.bias is not None,
            REORDERED=self.order is not None,
            **constants(self.scheme, width, self.run),
            num_warps=warps_of(width),
        )
        return replace(found, added=added)

    def cost(self, tokens: int, residual: bool = False) -> Cost:
        """What a call reads and writes: 2 bytes in and 1 out, 4 more with a residual."""
        return Cost(tokens * self.weight.shape[0] * (3 + 4 * residual), 0)


def build(kind: str, scheme: str, width: int, residual: bool, reordered: bool) -> Build:
    """What is compiled for a norm of `width` channels in bfloat16."""
    extra = f"{' + residual' if residual else ''}{' reordered' if reordered else ''}"
    code = "*fp8e4nv" if activation_scheme(scheme).code == "fp" else "*i8"
    return Build(
        name=f"norm_quantize {kind} {scheme} {width}{extra}",
        kernel=norm_quantize_kernel,
        arguments=dict.fromkeys(("x", "residual", "weight", "bias", "added"), "*bf16")
        | dict.fromkeys(("scale", "zero", "token_scale", "token_zero"), "*fp32")
        | {"order": "*i32", "codes": code, "sums": "*i32", "tokens": "i32", "eps": "fp32"},
        constants={
            "CENTERED": kind == "layer",
            "HAS_RESIDUAL": residual,
            "HAS_BIAS": kind == "layer",
            "REORDERED": reordered,
            **constants(scheme, width, 0),
        },
        handled=width,
        warps=warps_of(width),
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship: the norms of RPTQ on OPT, and of models with RMSNorm."""
    for width in (4096, 8192):
        yield build("layer", "int8:g128:asym", width, residual=False, reordered=True)
        yield build("rms", "int8:token:dynamic", width, residual=True, reordered=False)
        yield build("rms", "int8:token:asym:dynamic", width, residual=True, reordered=True)
        if device.capability >= 89:
            yield build("rms", "fp8:token:dynamic", width, residual=True, reordered=False)
