"""Bit planes: how kernels store low-bit weights, and how they unpack them in one AND and one FMA for two values.

Codes are cut into tiles of `rows` x `columns`. In a tile an int16 word of row r and place i holds one code of each of
its planes, and plane j holds column j * width + i, so that two neighbouring words are two neighbouring columns in
every plane: what an AND leaves in a 32-bit register is a pair of 16-bit floats, in the order the tensor cores want.
No code is shuffled, converted from an integer or written to shared memory.

| bits | words to a cell | planes |
|---|---|---|
| 2 | 1 | 8, at bits 0, 2, ... 14 |
| 3 | 3 | 5 in each word at bits 0, 3, ... 12; the 16th is spread over the three bits 15, the first word's the highest |
| 4 | 1 | 4 |
| 6 | 3 | 2 in each word at bits 0 and 6; 2 more in bits 12 to 15: of each four in the first two, two in the last |
| 8 | 1 | 2 |

A code alone in the low bits of a 16-bit float is a *subnormal number*: v at bit b of an fp16 is exactly v * 2^(b-24),
of a bfloat16 v * 2^(b-133), up to 11 and 8 bits (the smallest exponent continues the subnormals evenly). One FMA by
`scale * 2^-b` and `-zero * scale` then gives scale * (v - zero): both kinds of float, every plane, and symmetric and
asymmetric grids cost the same.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CAPACITY = 8  # bits that both kinds of float hold as evenly spaced numbers from zero

# What a scale is multiplied by so that scale / MAGNIFY * code's subnormal value * MAGNIFY**2 is an ordinary number;
# LEAST is the float of the code 1.
MAGNIFY = {torch.float16: 2.0**15, torch.bfloat16: 2.0**127}
LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}

# How a weight's grid is shifted: by the middle code (symmetric), by zero points, by minima.
MIDDLE, ZEROS, MINIMA = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# $1 words, $2 shift, $3 mask, $4 multiplier, $5 addend: pairs of 16 bits. The shift carries bits of the upper word
# into the lower; the mask removes them. Shift and mask are constants, so that ptxas folds or shares what it can.
UNPACK_F16 = tl.constexpr(
    "{ .reg .b32 s, t; and.b32 s, $2, 31; shr.b32 t, $1, s; and.b32 t, t, $3; fma.rn.f16x2 $0, t, $4, $5; }"
)
UNPACK_BF16 = tl.constexpr(
    "{ .reg .b32 s, t; and.b32 s, $2, 31; shr.b32 t, $1, s; and.b32 t, t, $3; fma.rn.bf16x2 $0, t, $4, $5; }"
)
# The zero point first, exactly, and then the scale: with 8 bits the product of both is too large to be rounded.
CENTER_F16 = tl.constexpr(
    "{ .reg .b32 s, t, one; mov.b32 one, 0x3c003c00; and.b32 s, $2, 31; shr.b32 t, $1, s; and.b32 t, t, $3;"
    " fma.rn.f16x2 t, t, one, $5; mul.rn.f16x2 $0, t, $4; }"
)
CENTER_BF16 = tl.constexpr(
    "{ .reg .b32 s, t, one, none; mov.b32 one, 0x3f803f80; mov.b32 none, 0x80008000; and.b32 s, $2, 31;"
    " shr.b32 t, $1, s; and.b32 t, t, $3; fma.rn.bf16x2 t, t, one, $5; fma.rn.bf16x2 $0, t, $4, none; }"
)
# Of the last two planes of 6 bits: $0 = the highest four bits of $1, above them the two of $2 from bit 12 or 14 on.
JOIN_12 = tl.constexpr(
    "{ .reg .b32 s, t; shr.b32 s, $1, 12; and.b32 s, s, 0x000f000f; shr.b32 t, $2, 8; and.b32 t, t, 0x00300030;"
    " or.b32 $0, s, t; }"
)
JOIN_14 = tl.constexpr(
    "{ .reg .b32 s, t; shr.b32 s, $1, 12; and.b32 s, s, 0x000f000f; shr.b32 t, $2, 10; and.b32 t, t, 0x00300030;"
    " or.b32 $0, s, t; }"
)
# $0 = bytes of $1, by the numbers in $2, two of them zeros: one instruction for two groups' zero points, which LLVM,
# left to itself, picks one by one.
PICK = tl.constexpr("prmt.b32 $0, $1, 0, $2;")
# $0 = 2 * $1 plus bit 15 of $2.
TAKE_TOP = tl.constexpr(
    "{ .reg .b32 s, t; shl.b32 s, $1, 1; shr.b32 t, $2, 15; and.b32 t, t, 0x00010001; or.b32 $0, s, t; }"
)


@triton.jit
def unpack(words, multiplier, addend, PLANE: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr):
    """Plane PLANE (counted in the word) of int16 words [rows, width], with what `grid_of` gives for each row.

    Returns [rows, width] in the dtype of `multiplier` [rows], which is that of addend [rows].
    """
    whole: tl.constexpr = 8 // BITS * BITS
    shift: tl.constexpr = PLANE * BITS // whole * whole  # leaves the code in the low 8 bits
    place: tl.constexpr = PLANE * BITS - shift
    shifts = tl.full(words.shape, shift, tl.int16)
    masks = tl.full(words.shape, ((1 << BITS) - 1) << place, tl.int16)
    multipliers = tl.broadcast_to((multiplier * (1.0 / (1 << place))).to(multiplier.dtype)[:, None], words.shape)
    addends = tl.broadcast_to(addend[:, None], words.shape)
    arguments = (words, shifts, masks, multipliers, addends)
    HALF: tl.constexpr = multiplier.dtype == tl.float16
    CENTER: tl.constexpr = CENTER_F16 if HALF else CENTER_BF16
    UNPACK: tl.constexpr = UNPACK_F16 if HALF else UNPACK_BF16
    ASM: tl.constexpr = CENTER if BITS == 8 and GRID == ZEROS else UNPACK
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r,r,r", arguments, multiplier.dtype, is_pure=True, pack=2)


@triton.jit
def take_top(collected, words):
    """`collected` (int16, as words) moved up by one bit, and bit 15 of `words` below it."""
    return tl.inline_asm_elementwise(TAKE_TOP, "=r,r,r", (collected, words), tl.int16, is_pure=True, pack=2)


@triton.jit
def join_six(low, high, PLANE: tl.constexpr):
    """Plane 6 or 7 of 6-bit codes, in the low bits of int16 words, from a cell's first or second word and its third."""
    ASM: tl.constexpr = JOIN_12 if PLANE == 6 else JOIN_14
    return tl.inline_asm_elementwise(ASM, "=r,r,r", (low, high), tl.int16, is_pure=True, pack=2)


@triton.jit
def half_of(pair, group, DTYPE: tl.constexpr):
    """The 16-bit float of an even group in the low half of int32 words, of an odd one in the high half."""
    return (pair >> ((group & 1) * 16)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def every_other_byte(words, which):
    """Bytes 0 and 2, or 1 and 3, of int32 words, as the low bytes of their halves."""
    picked = tl.full(words.shape, 0x4240, tl.int32) + which * 0x0101
    return tl.inline_asm_elementwise(PICK, "=r,r,r", (words, picked), tl.int32, is_pure=True, pack=1)


@triton.jit
def grid_of(pair, more, group, BITS: tl.constexpr, GRID: tl.constexpr, DTYPE: tl.constexpr):
    """What `unpack` multiplies by and adds for a group, [n] each, from its words of scales, and zero points or minima.

    The addend is -zero * scale, rounded; of a symmetric grid exact, as zero is a power of two. With 8 bits and a zero
    point of their own it is -zero. A minimum is the addend itself.
    """
    multiplier = half_of(pair, group, DTYPE)
    if GRID == MINIMA:
        addend = half_of(more, group, DTYPE)
    else:
        if GRID == MIDDLE:
            zero = tl.full(pair.shape, 1 << (BITS - 1), tl.int16).to(DTYPE, bitcast=True)
        else:
            zero = half_of(every_other_byte(more, group & 1), group >> 1, DTYPE)
        addend = -zero if BITS == 8 and GRID == ZEROS else -(zero * multiplier)
    return multiplier, addend


@dataclass(frozen=True)
class Cells:
    """How codes of `bits` bits share words: `words` to a cell, holding `planes` codes.

    >>> Cells.of(3)
    Cells(bits=3, words=3, fields=5, planes=16)
    """

    bits: int
    words: int
    fields: int
    planes: int

    @classmethod
    def of(cls, bits: int) -> "Cells":
        """The cells of a code width of 2, 3, 4, 6 or 8 bits."""
        found = {3: cls(3, 3, 5, 16), 6: cls(6, 3, 2, 8)}
        return found.get(bits) or cls(bits, 1, 16 // bits, 16 // bits)


def pack_planes(codes: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Codes (uint8 [n, k]) as int16 [tiles of n, tiles of k, words, rows, width]; what fills up a tile is zero.

    >>> codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    >>> [hex(word) for word in pack_planes(codes, 4, rows=1, columns=16).flatten().tolist()]
    ['-0x37c0', '-0x26af', '-0x159e', '-0x48d']
    """
    cells = Cells.of(bits)
    missing = (0, -codes.shape[1] % columns, 0, -codes.shape[0] % rows)
    padded = torch.nn.functional.pad(codes, missing)
    tiled = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, cells.planes, -1)
    planes = tiled.permute(3, 0, 2, 1, 4)
    packed = []
    for word in range(cells.words):
        whole = torch.zeros(planes.shape[1:], dtype=torch.int32, device=codes.device)
        for field in range(cells.fields):
            whole |= planes[word * cells.fields + field].int() << (field * bits)
        if bits == 3:
            whole |= (planes[15].int() >> (2 - word) & 1) << 15
        if bits == 6:
            rest = (planes[6] & 15, planes[7] & 15, planes[6] >> 4 | planes[7] >> 4 << 2)
            whole |= rest[word].int() << 12
        packed.append(whole.to(torch.int16))
    return torch.stack(packed, dim=2).contiguous()


def unpack_planes(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The codes, uint8 [n, k], that `pack_planes` packed."""
    cells = Cells.of(bits)
    whole = [words[:, :, word].int() & 0xFFFF for word in range(cells.words)]
    mask = (1 << bits) - 1
    planes = [whole[word] >> (field * bits) & mask for word in range(cells.words) for field in range(cells.fields)]
    if bits == 3:
        planes.append((whole[0] >> 15 << 2) | (whole[1] >> 15 << 1) | whole[2] >> 15)
    if bits == 6:
        planes += [whole[0] >> 12 | (whole[2] >> 12 & 3) << 4, whole[1] >> 12 | whole[2] >> 14 << 4]
    tiled = torch.stack(planes).permute(1, 3, 2, 0, 4)  # [tiles of n, rows, tiles of k, planes, width]
    return tiled.reshape(tiled.shape[0] * tiled.shape[1], -1)[:n, :k].to(torch.uint8)
