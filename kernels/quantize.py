"""quantize: activations that no norm makes, rounded to 8 bits or fewer in one launch; and rounding, as norms do it too.

What attention and a gated product leave (the inputs of o_proj and down_proj) is read once and written once, as codes,
with the scale of each token and whatever a product over these codes needs beside them: where the weight has zero
points, the sum of the codes of each run of columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.packed_integers import MAGIC
from qcompiler.kernels.sass import Build
from qcompiler.rounding import E4M3, activation_scheme, group_size
from qcompiler.scheme import Scheme

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def divide(x, y, inverse):
    """x / y rounded once, given 1 / y rounded once: the remainder of the first guess mends it."""
    guess = x * inverse
    return tl.fma(tl.fma(-guess, y, x), inverse, guess)


@triton.jit
def grid_of_channels(scale, zero, at, there):
    """Step, its inverse and middle of a static grid at places `at` of scale and zero."""
    step = tl.load(scale + at, mask=there, other=1.0).to(tl.float32)
    middle = tl.load(zero + at, mask=there, other=0).to(tl.float32)
    return step, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step), middle


@triton.jit
def grid_of_token(values, there, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, FLOATS: tl.constexpr):
    """Step, its inverse and middle of the grid that covers a token's values."""
    HALF: tl.constexpr = LEVELS // 2
    highest = tl.maximum(tl.max(tl.where(there, values, 0.0), axis=0), 0.0)
    lowest = tl.minimum(tl.min(tl.where(there, values, 0.0), axis=0), 0.0)
    if FLOATS:
        size = tl.div_rn(tl.maximum(highest, -lowest), LARGEST)
    elif SYMMETRIC:
        size = tl.div_rn(tl.maximum(highest, -lowest), HALF - 1.0)
    else:
        size = tl.div_rn(highest - lowest, LEVELS - 1.0)
    size = tl.where(size > 0, size, 1.0)
    center = HALF * 1.0
    if not SYMMETRIC:
        # Adding and taking away 1.5 * 2^23 leaves whole numbers, ties rounded to even.
        center = tl.minimum((tl.div_rn(-lowest, size) + 12582912.0) - 12582912.0, LEVELS - 1.0)
    return size, tl.div_rn(1.0, size), center


@triton.jit
def store_codes(
    values,
    there,
    at,
    part,
    token,
    tokens,
    grid,
    codes,
    token_scale,
    token_zero,
    sums,
    LEVELS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    MAGIC: tl.constexpr,
):
    """Round part `part` of a token's values, float32 [BLOCK], and store codes, less LEVELS / 2, or floats, at `at`.

    `grid` is a static one, as of `grid_of_channels`; a dynamic one is stored for the token. With a RUN, the sums of the
    codes of each so many columns go to sums [RUNS, tokens].
    """
    FLOATS: tl.constexpr = codes.dtype.element_ty == tl.float8e4nv
    HALF: tl.constexpr = LEVELS // 2
    size, inverse, center = grid
    if DYNAMIC:
        size, inverse, center = grid_of_token(values, there, LEVELS, SYMMETRIC, FLOATS)
        tl.store(token_scale + token, size)
        if not SYMMETRIC:
            tl.store(token_zero + token, center - HALF)
    steps = divide(values, size, inverse)
    if FLOATS:
        stored = steps.to(tl.float8e4nv)
        counted = stored.to(tl.float32)
    else:
        steps = tl.minimum(tl.maximum(steps, -center), (LEVELS - 1) - center)
        # The same sum as bits: its last ones are the whole number.
        counted = (steps + 12582912.0).to(tl.int32, bitcast=True) - MAGIC + (center - HALF).to(tl.int32)
        stored = counted.to(tl.int8)
    tl.store(codes + at, stored, mask=there)
    if RUN:
        WIDE: tl.constexpr = values.shape[0] // RUN
        each = tl.sum(tl.reshape(tl.where(there, counted, 0), (WIDE, RUN)), axis=1)
        run = part * WIDE + tl.arange(0, WIDE)
        tl.store(sums + run * tokens + token, each, mask=run < RUNS)


@triton.jit
def quantize_kernel(
    x,
    scale,
    zero,
    codes,
    token_scale,
    token_zero,
    sums,
    tokens,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    MAGIC: tl.constexpr,
):
    """Rows i, i + programs, ... of x [tokens, WIDTH], of those the j-th BLOCK columns, for program (i, j).

    Codes [tokens, WIDTH], and what `store_codes` stores beside; scale and zero are those of each GROUP columns.
    """
    part = tl.program_id(1)
    j = part * BLOCK + tl.arange(0, BLOCK)
    there = j < WIDTH
    grid = (1.0, 1.0, 0.0)
    if not DYNAMIC:
        step, inverse, middle = grid_of_channels(scale, scale if SYMMETRIC else zero, j // GROUP, there)
        grid = step, inverse, (tl.full(step.shape, LEVELS // 2, tl.float32) if SYMMETRIC else middle)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        begin = tl.cast(token, tl.int64) * WIDTH
        row = tl.load(x + begin + j, mask=there, other=0.0).to(tl.float32)
        store_codes(
            row,
            there,
            begin + j,
            part,
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


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rounded activations.

    `codes` int8 [tokens, width], less half the levels, or float8_e4m3fn; of a dynamic scheme `scale`, and `zero` less
    half the levels too unless symmetric, float32 [tokens]; `sums` int32 (float32) [runs, tokens] if asked for; `added`,
    the sum of x and residual of a norm, if there was one.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    sums: Tensor | None = None
    added: Tensor | None = None

    @classmethod
    def room(cls, x: Tensor, scheme: str, run: int) -> "Quantized":
        """What a kernel writes for x [tokens, width]; `run` columns are summed up, 0 is none."""
        kind = activation_scheme(scheme)
        tokens, width = x.shape
        stored, summed = code_dtypes(kind)
        codes = torch.empty_like(x, dtype=stored)
        scale = x.new_empty(tokens, dtype=torch.float32) if kind.dynamic else None
        zero = torch.empty_like(scale) if scale is not None and not kind.symmetric else None
        sums = x.new_empty(-(-width // run), tokens, dtype=summed) if run else None
        return cls(codes, scale, zero, sums)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of a launch: what there is not is never written."""
        spare = self.codes
        scale, zero, sums = (spare if part is None else part for part in (self.scale, self.zero, self.sums))
        return self.codes, scale, zero, sums


def code_dtypes(kind: Scheme) -> tuple[torch.dtype, torch.dtype]:
    """Of codes, and of their sums."""
    return (torch.int8, torch.int32) if kind.code == "int" else (E4M3, torch.float32)


def constants(scheme: str, width: int, run: int, cut: int = 0) -> dict[str, object]:
    """What a launch that rounds rows of `width` fixes, `cut` columns to a program; 0 is all."""
    kind = activation_scheme(scheme)
    block = triton.next_power_of_2(cut or width)
    whole = {"WIDTH": width, "BLOCK": block, "LEVELS": kind.levels, "DYNAMIC": kind.dynamic}
    # A run of all columns is one of all the block.
    runs = {"RUN": block if run >= width else run, "RUNS": -(-width // run) if run else 0}
    return whole | {"SYMMETRIC": kind.symmetric, **runs, "MAGIC": MAGIC}


def quantize(x: Tensor, grid: Sequence[Tensor], scheme: str, run: int = 0) -> Quantized:
    """Codes of x [tokens, width], contiguous, by `scheme`, static to `grid`, as in qc.fake_quantize.

    `run`, a power of two or at least the width, is the number of columns whose codes are summed up; 0 is none.
    """
    tokens, width = x.shape
    found, scale = Quantized.room(x, scheme, run), grid[0] if grid else x
    cut = columns_of(scheme, width, run)
    launched = min(tokens, programs(cut, device_of(x))), triton.cdiv(width, cut)
    fixed = constants(scheme, width, run, cut)
    fixed["GROUP"] = group_size(activation_scheme(scheme), width)
    quantize_kernel[launched](
        x, scale, grid[-1] if grid else x, *found.outputs(), tokens, **fixed, num_warps=warps_of(cut)
    )
    return found


def columns_of(scheme: str, width: int, run: int) -> int:
    """Columns of a program: all that share a grid or a sum; else no more than registers hold beside their grid."""
    whole = activation_scheme(scheme).dynamic or run >= width
    return width if whole else min(width, 4096)


def cost(tokens: int, width: int) -> Cost:
    """What a launch reads and writes: 2 bytes in and 1 out."""
    return Cost(3 * tokens * width, 0)


def warps_of(width: int) -> int:
    """So many that a thread holds 8 channels, which is one load, and what belongs to them."""
    block: int = triton.next_power_of_2(width)
    return max(1, min(16, block // 256))


def programs(width: int, device: Device) -> int:
    """As many as run at once: a processor holds 64 warps, of which registers leave room for half."""
    return device.processors * max(1, 32 // warps_of(width))


def build(scheme: str, width: int, run: int) -> Build:
    """What is compiled for rows of `width` channels in bfloat16."""
    floats, cut = activation_scheme(scheme).code == "fp", columns_of(scheme, width, run)
    return Build(
        name=f"quantize {scheme} {width}{f' sums of {run}' if run else ''}",
        kernel=quantize_kernel,
        arguments={"x": "*bf16", "codes": "*fp8e4nv" if floats else "*i8", "sums": "*fp32" if floats else "*i32"}
        | dict.fromkeys(("scale", "zero", "token_scale", "token_zero"), "*fp32")
        | {"tokens": "i32"},
        constants=constants(scheme, width, run, cut) | {"GROUP": group_size(activation_scheme(scheme), width)},
        handled=cut,
        warps=warps_of(cut),
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship: what attention and a gated product leave, in a model of 8 billion parameters."""
    for width in (4096, 14336):
        yield build("int8:token:dynamic", width, 0)
        yield build("int8:token:asym:dynamic", width, 128)
        yield build("int8:g128:asym", width, 0)
        if device.capability >= 89:
            yield build("fp8:token:dynamic", width, 128)
