"""GGUF's blocks of 32 values with one scale, as QTensors and back: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4.

A block is a scale (float16; of MXFP4 a power of two in one byte), a minimum (the types ending in _1), the fifth bits of
the codes (Q5), and the codes: the low halves of 16 bytes, then the high ones. Reading and writing move bits and compute
nothing: what one makes the other takes apart, exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.scheme import QTensor, Scheme

Shape = tuple[int, ...]

# The 16 values of IQ4_NL and IQ4_XS, and of MXFP4 (the OCP's e2m1, doubled): format facts, as gguf-py has them.
IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


@dataclass(frozen=True)
class Kind:
    """A block type: its size, the form of its records, and how blocks and records become each other.

    - `block`: values a block; `nbytes`: its bytes
    - `scheme`: of the record; `second`: of its scales, where they are codes too; `minima`: whether it has minima
    - `codebook`: what the codes stand for, where that is not their number
    - `decode`: blocks uint8 [rows, blocks, nbytes] and the matrix's shape, to its record; `encode`: back
    """

    name: str
    block: int
    nbytes: int
    scheme: Scheme
    decode: Callable[[Tensor, Shape], QTensor]
    encode: Callable[[QTensor], Tensor | No]
    second: Scheme | None = None
    minima: bool = False
    codebook: tuple[float, ...] | None = None

    @property
    def bits(self) -> float:
        """Bits a value takes.

        >>> from qcompiler.formats.gguf_types import KINDS
        >>> KINDS["Q6_K"].bits
        6.5625
        """
        return 8 * self.nbytes / self.block

    def holds(self, record: QTensor) -> bool | No:
        """Whether a record has this type's form, so that `encode` only moves its bits."""
        if len(record.shape) != 2 or record.axis not in (-1, 1):
            return No("it is no matrix with its groups in rows")
        if record.shape[1] % self.block:
            return No(f"rows of {record.shape[1]} values are not whole blocks of {self.block}")
        if record.scheme != self.scheme:
            return No(f"{record.scheme} is not {self.scheme}")
        if any(part is not None for part in (record.zero, record.boundaries, record.permutation)):
            return No("it has zero points, boundaries or a permutation")
        if (record.minimum is not None) != self.minima:
            return No("it has minima" if record.minimum is not None else "it has no minima")
        if (record.codebook is None) != (self.codebook is None) or (
            record.codebook is not None and tuple(record.codebook.tolist()) != self.codebook
        ):
            return No("its codes stand for other values")
        levels = [record.scale, *([record.minimum] if self.minima else [])]
        return all(_has_level(level, self.second) for level in levels) or No("its scales are stored otherwise")


def _has_level(level: Tensor | QTensor | None, second: Scheme | None) -> bool:
    """Whether scales or minima are floats (`second` None), or codes that count from nothing times one step."""
    if second is None or not isinstance(level, QTensor):
        return second is None and isinstance(level, Tensor)
    if level.scheme != second or not isinstance(level.scale, Tensor) or level.minimum is not None:
        return False
    return level.zero is None if second.symmetric else level.zero is not None and not bool(level.zero.any())


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at byte `start` of each block; [rows, blocks]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def half_bytes(values: Tensor | QTensor) -> Tensor | No:
    """Floats [rows, blocks] as the bytes of float16 numbers, uint8 [rows, blocks, 2]; No if one would be rounded."""
    assert isinstance(values, Tensor)
    rounded = values.half()
    same = torch.equal(rounded.to(values.dtype), values)
    return rounded.contiguous()[..., None].view(torch.uint8) if same else No("its scales are finer than float16")


def nibbles(blocks: Tensor, start: int) -> Tensor:
    """The 4-bit codes of each block: the low halves of 16 bytes, then the high ones; [rows, blocks, 32]."""
    data = blocks[..., start : start + 16]
    return torch.cat([data & 15, data >> 4], dim=-1)


def nibble_bytes(codes: Tensor) -> Tensor:
    """What `nibbles` reads, from codes [..., 32] (their low four bits): uint8 [..., 16]."""
    return (codes[..., :16] & 15) | (codes[..., 16:] << 4)


_PLACES = torch.arange(8, dtype=torch.uint8)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Bit 4 of each code, in place (0 or 16); [rows, blocks, 32]."""
    return (blocks[..., start : start + 4, None] >> _PLACES & 1).flatten(-2) << 4


def _fifth_bytes(codes: Tensor) -> Tensor:
    """What `_fifth_bits` reads, from codes [rows, blocks, 32]: uint8 [rows, blocks, 4]."""
    found: Tensor = ((codes >> 4 & 1).unflatten(-1, (4, 8)) << _PLACES).sum(-1, dtype=torch.uint8)
    return found


def _powers(blocks: Tensor) -> Tensor:
    """MXFP4's scales, half of two to the power of a byte less 127; float32 [rows, blocks]."""
    return torch.ldexp(torch.ones(blocks.shape[:2]), blocks[..., 0].int() - 128)


def _power_bytes(scale: Tensor | QTensor) -> Tensor | No:
    assert isinstance(scale, Tensor)
    mantissa, exponent = torch.frexp(scale.float())
    fits = bool(((mantissa == 0.5) & (exponent >= -127) & (exponent <= 128)).all())
    return (exponent + 127).to(torch.uint8)[..., None] if fits else No("its scales are not all powers of two")


def _kind(name: str, bits: int, minima: bool = False, codebook: tuple[float, ...] | None = None) -> Kind:
    """A type of this family; the bytes of a block in order: scale, minimum, fifth bits, codes."""
    power = codebook is E2M1
    code = "int" if codebook is None else "fp" if power else "nf"
    scheme = Scheme.parse(f"{code}{bits}:g32:{'asym' if minima else 'sym'}")
    fifths = (1 if power else 4 if minima else 2, bits == 5)
    start = fifths[0] + 4 * fifths[1]

    def decode(blocks: Tensor, shape: Shape) -> QTensor:
        codes = blocks[..., start:] ^ 128 if bits == 8 else nibbles(blocks, start)
        if fifths[1]:
            codes = codes | _fifth_bits(blocks, fifths[0])
        return QTensor(
            scheme,
            shape,
            pack_bits(codes.flatten(1), bits),
            _powers(blocks) if power else half(blocks, 0),
            minimum=half(blocks, 2) if minima else None,
            codebook=None if codebook is None else torch.tensor(codebook),
        )

    def encode(record: QTensor) -> Tensor | No:
        codes = record.unpacked().unflatten(1, (-1, 32))
        fields = [_power_bytes(record.scale) if power else half_bytes(record.scale)]
        fields += [half_bytes(record.minimum)] if record.minimum is not None else []
        fields += [_fifth_bytes(codes)] if fifths[1] else []
        fields += [codes ^ 128 if bits == 8 else nibble_bytes(codes)]
        return joined(fields)

    return Kind(name, 32, start + (32 if bits == 8 else 16), scheme, decode, encode, None, minima, codebook)


def joined(fields: list[Tensor | No]) -> Tensor | No:
    """The fields of blocks, uint8 [rows, blocks, bytes] each, behind one another; the first No there is."""
    parts = [field for field in fields if isinstance(field, Tensor)]
    return torch.cat(parts, dim=-1) if len(parts) == len(fields) else next(f for f in fields if isinstance(f, No))


KINDS = (
    _kind("Q4_0", 4),
    _kind("Q4_1", 4, minima=True),
    _kind("Q5_0", 5),
    _kind("Q5_1", 5, minima=True),
    _kind("Q8_0", 8),
    _kind("IQ4_NL", 4, codebook=IQ4),
    _kind("MXFP4", 4, codebook=E2M1),
)
