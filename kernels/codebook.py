"""Codes that stand for the entries of a codebook (NF4, FP4, IQ4_NL): tables of bytes, and how four look-ups are one.

The instruction PRMT picks four bytes out of eight, by four numbers of four bits, of which the highest makes of the byte
its sign, eight times: 0x00 or 0xFF. A codebook has sixteen entries, of two bytes each as a 16-bit float. So one PRMT
over the first eight entries and one over the last, the highest bit turned over, give for each code an entry and a sign,
which an XOR puts together: the sign it adds is known, and the table was stored with it taken away. That works out where
the entries of places j and j + 8 have the same sign, in both of their bytes. Which code has which place is free, and
the common factor of all entries too; among all these there is a choice that works, for every codebook seen so far.

No entry is looked up in memory and none rounded but to the 16 bits it is stored in: of NF4, 3 instructions to a weight.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.errors import No

ENTRIES = 16
# What entries of at most 1 are stored as shares of, so that entry times share of a scale (planes.MAGNIFY) is ordinary.
UNIT = {torch.float16: 2.0**-4, torch.bfloat16: 2.0**-100}

# $0 the values of a plane; $1 words, $2 multipliers; then the tables, each twice, for the two elements of a pair: of
# low bytes those of places 0 to 3, 4 to 7, 8 to 11, 12 to 15, then of high bytes. The first line takes the byte of each
# of the two words that holds the codes of planes 0 and 1, or 2 and 3; all but the last ptxas shares between the two.
_LOOK_UP = (
    "{{ .reg .b32 t, u, a, b, l, h; prmt.b32 t, $1, $1, {taken}; xor.b32 u, t, 0x8888;"
    " prmt.b32 a, $3, $5, t; prmt.b32 b, $7, $9, u; xor.b32 l, a, b;"
    " prmt.b32 a, $11, $13, t; prmt.b32 b, $15, $17, u; xor.b32 h, a, b;"
    " prmt.b32 a, l, h, {joined}; {product} }}"
)
_PLANES = (("0x20", "0x6240"), ("0x20", "0x7351"), ("0x31", "0x6240"), ("0x31", "0x7351"))
_TIMES_F16 = "mul.rn.f16x2 $0, a, $2;"
_TIMES_BF16 = "mov.b32 u, 0x80008000; fma.rn.bf16x2 $0, a, $2, u;"
LOOK_UP_F16 = tl.constexpr([_LOOK_UP.format(taken=t, joined=j, product=_TIMES_F16) for t, j in _PLANES])
LOOK_UP_BF16 = tl.constexpr([_LOOK_UP.format(taken=t, joined=j, product=_TIMES_BF16) for t, j in _PLANES])
_OPERANDS = tl.constexpr("=r" + ",r" * 18)

# $1, joined with a bit that no thread's mask of lower threads has: a number all have in common, but in a register of
# each. Left to itself ptxas keeps four tables in uniform registers, and copies them for each look-up, at one
# instruction to a weight.
SPREAD = tl.constexpr("{ .reg .b32 t; mov.u32 t, %lanemask_lt; and.b32 t, t, 0x80000000; or.b32 $0, $1, t; }")


@triton.jit
def load_table(tables, place: tl.constexpr):
    """Register `place` of `Tables`, int32 [1, 1], in every thread.

    A tensor, because through the splat of a scalar Triton moves no change of layout: what was looked up would go to
    shared memory and back.
    """
    one = tl.load(tables + place + tl.zeros((1, 1), tl.int32))
    return tl.inline_asm_elementwise(SPREAD, "=r,r", [one], tl.int32, is_pure=True, pack=1)


@triton.jit
def load_tables(tables):
    """The eight registers of `Tables`."""
    return (
        load_table(tables, 0),
        load_table(tables, 1),
        load_table(tables, 2),
        load_table(tables, 3),
        load_table(tables, 4),
        load_table(tables, 5),
        load_table(tables, 6),
        load_table(tables, 7),
    )


@triton.jit
def look_up(words, multiplier, tables, PLANE: tl.constexpr):
    """Plane PLANE of int16 words [rows, width] of 4-bit places: their entries times `multiplier` [rows].

    Returns [rows, width] in the dtype of `multiplier`; `tables` are those of `load_tables`.
    """
    shape: tl.constexpr = words.shape
    arguments = (
        words,
        tl.broadcast_to(multiplier[:, None], shape),
        tl.broadcast_to(tables[0], shape),
        tl.broadcast_to(tables[1], shape),
        tl.broadcast_to(tables[2], shape),
        tl.broadcast_to(tables[3], shape),
        tl.broadcast_to(tables[4], shape),
        tl.broadcast_to(tables[5], shape),
        tl.broadcast_to(tables[6], shape),
        tl.broadcast_to(tables[7], shape),
    )
    ASM: tl.constexpr = LOOK_UP_F16[PLANE] if multiplier.dtype == tl.float16 else LOOK_UP_BF16[PLANE]
    return tl.inline_asm_elementwise(ASM, _OPERANDS, arguments, multiplier.dtype, is_pure=True, pack=2)


@dataclass(frozen=True, eq=False)
class Tables:
    """A codebook as `look_up` reads it.

    - `places`: uint8 [16], the place of each code
    - `registers`: int32 [8]: of the low bytes places 0 to 3, 4 to 7, 8 to 11, 12 to 15, then of the high bytes
    - `unit`: what an entry is to be multiplied by after it was looked up
    """

    places: Tensor
    registers: Tensor
    unit: float

    @classmethod
    def of(cls, codebook: Tensor, dtype: torch.dtype) -> "Tables | No":
        """The tables of a codebook (float [16]) for values in `dtype`, float16 or bfloat16.

        >>> found = Tables.of(torch.linspace(-1, 1, 16), torch.float16)
        >>> found.places.unique().tolist() == list(range(16))
        True
        """
        found = cls.alike(codebook, dtype)
        return found if isinstance(found, No) else found[0]

    @classmethod
    def alike(cls, codebook: Tensor, *dtypes: torch.dtype) -> "list[Tables] | No":
        """The tables of a codebook for values in each of `dtypes`, with the same places."""
        if codebook.shape != (ENTRIES,):
            return No(f"a codebook of {codebook.numel()} entries, not {ENTRIES}")
        largest = float(codebook.abs().max()) or 1.0
        # Of the factors of a single dtype one in four to eight goes well.
        for attempts in itertools.product(range(64), repeat=len(dtypes)):
            units = [
                largest / ((1 - attempt / 128) * UNIT[dtype]) for attempt, dtype in zip(attempts, dtypes, strict=True)
            ]
            bits = torch.stack(
                [
                    (codebook.double().cpu() / unit).to(dtype).view(torch.int16).int() & 0xFFFF
                    for unit, dtype in zip(units, dtypes, strict=True)
                ]
            )
            if (order := _paired(bits)) is not None:
                places = torch.argsort(order).to(torch.uint8)
                return [cls(places, _registers(one[order]), unit) for one, unit in zip(bits, units, strict=True)]
        return No("a codebook whose signs do not go in pairs")

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The entries, float64 [16], as `look_up` gives them, times the unit."""
        table = self.registers.view(torch.uint8).view(2, 2, 8)  # byte, half, place
        signs = torch.where(table > 127, 255, 0)
        low, high = (table ^ signs.flip(1)).flatten(1).int()
        entries = (low | high << 8).to(torch.int16).view(dtype)
        values: Tensor = entries[self.places.long()].double() * self.unit
        return values


def _paired(bits: Tensor) -> Tensor | None:
    """Codes in the order of their places, so that the 16-bit entries of j and j + 8 agree in both bytes' signs.

    `bits` int32 [dtypes, 16]; the sign of zero is changed in them where that helps.
    """
    kinds: dict[tuple[int, ...], list[int]] = {}
    for code, entries in enumerate(bits.T.tolist()):
        kinds.setdefault(tuple(entry & 0x8080 for entry in entries), []).append(code)
    odd = {kind for kind, codes in kinds.items() if len(codes) % 2}
    if odd:
        zeros = [code for code, entries in enumerate(bits.T.tolist()) if not any(entry & 0x7FFF for entry in entries)]
        was = tuple(bits[:, zeros[0]].tolist()) if zeros else ()
        turned = tuple(entry ^ 0x8000 for entry in was)
        if odd != {was, turned}:
            return None
        kinds[was].remove(zeros[0])
        kinds[turned].append(zeros[0])
        bits[:, zeros[0]] ^= 0x8000
    firsts = [code for codes in kinds.values() for code in codes[::2]]
    seconds = [code for codes in kinds.values() for code in codes[1::2]]
    return torch.tensor(firsts + seconds)


def _registers(entries: Tensor) -> Tensor:
    """16-bit entries in the order of their places as `Tables.registers`."""
    table = torch.stack([entries & 255, entries >> 8]).view(2, 2, 8)
    # Each place shall get its byte and the other half's sign; where both signs are set, the first half keeps its.
    both = table[:, :1] > 127
    turned = torch.cat([torch.zeros_like(both), both], dim=1)
    return torch.where(turned, table ^ 255, table).to(torch.uint8).flatten().view(torch.int32)
