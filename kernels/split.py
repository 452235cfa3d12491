"""How a product is cut up, and how it comes together: blocks of tokens, parts of k, the end of a program.

Where the tiles of n are fewer than the machine's processors, k is split. Each program writes its part of the sum; the
one that comes last finds all of them and adds them up in order: no float is added atomically, so the same input gives
the same bits, and no second launch is needed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.kernels.cost import Device
from qcompiler.kernels.packed_weight import ROWS


@dataclass(frozen=True)
class Config:
    """How a launch is cut up: tokens of a program, parts of k, warps, stages of the pipeline."""

    tokens: int
    split: int
    warps: int = 4
    stages: int = 4


def token_block(tokens: int, largest: int) -> int:
    """Tokens of a program: the least power of two from 8 on that holds them all, up to 64, or else `largest`."""
    return next((size for size in (8, 16, 32, 64) if tokens <= size), largest)


def parts_of_k(n: int, steps: int, device: Device) -> int:
    """Into how many parts to split the `steps` of a row, for a weight of n rows.

    Two programs to a processor hide each other's waiting; a part of less than four steps never fills the pipeline.
    """
    wanted = -(-2 * device.processors // -(-n // ROWS))
    parts = max(1, min(wanted, steps // 4, 16))
    return -(-steps // -(-steps // parts))  # with as many steps each, the last parts may have none


def most_registers(device: Device) -> int | None:
    """What ptxas is told a thread may have: on Blackwell all, or it moves some to memory for more programs to fit."""
    return 255 if device.capability >= 100 else None


def room_for(x: Tensor, n: int, tiles: int, config: Config) -> tuple[Tensor, Tensor]:
    """The result [..., n] of a product of x [..., k], and float32 room for its parts (or itself, if it has one)."""
    out = x.new_empty((*x.shape[:-1], n))
    if config.split == 1:
        return out, out
    return out, x.new_empty((config.split, config.tokens, tiles * ROWS), dtype=torch.float32)


@triton.jit
def leave_part(acc, part_at, arrived, split, SUM: tl.constexpr, SPLIT: tl.constexpr):
    """Write the part of this program, `acc`, to place `split` of SUM numbers each; true unless all others have."""
    tl.store(part_at + split * SUM, acc)
    tl.debug_barrier()  # every thread's part is written before one of them says so
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    return before < SPLIT - 1


@triton.jit
def add_parts(acc, part_at, arrived, SUM: tl.constexpr, SPLIT: tl.constexpr):
    """All parts, added up in order, for the program that came last; `acc` says in what shape and dtype."""
    tl.store(arrived, 0)  # ready for the next launch
    acc = tl.zeros(acc.shape, acc.dtype)
    for part in tl.static_range(SPLIT):
        acc += tl.load(part_at + part * SUM, cache_modifier=".cg")
    return acc


@triton.jit
def store_sums(acc, row_scale, bias, out, m, n, tokens, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums [n, m] in float32, times a scale for each row, plus bias [N], into out [tokens, N]."""
    acc = acc * tl.load(row_scale + n)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0)[:, None].to(tl.float32)
    there = (m[None, :] < tokens) & (n[:, None] < N)
    tl.store(out + m[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=there)
