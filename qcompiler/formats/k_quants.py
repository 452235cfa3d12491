"""GGUF's superblocks as QTensors and back: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS, with scales of two levels.

A superblock is 256 neighbouring values of a row, in groups of 16 or 32 whose scales (and minima) are codes of one
float16 step each:

| type | codes | groups | scales | minima |
|---|---|---|---|---|
| Q2_K | 2 bits | 16 of 16 | 4 bits | 4 bits |
| Q3_K | 3 bits, signed | 16 of 16 | 6 bits, signed | |
| Q4_K, Q5_K | 4, 5 bits | 8 of 32 | 6 bits | 6 bits |
| Q6_K | 6 bits, signed | 16 of 16 | 8 bits, signed | |
| IQ4_XS | 4 bits of a codebook | 8 of 32 | 6 bits, signed | |
"""

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.formats.gguf_blocks import IQ4, Kind, Shape, half, half_bytes, joined, nibble_bytes
from qcompiler.scheme import QTensor, Scheme

SUPERBLOCK = 256
_QUARTERS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
_EIGHTHS = torch.arange(8, dtype=torch.uint8)


def _record(kind: str, shape: Shape, codes: Tensor, scale: QTensor, minimum: QTensor | None = None) -> QTensor:
    scheme = SCHEMES[kind][0]
    book = torch.tensor(IQ4) if kind == "IQ4_XS" else None
    return QTensor(scheme, shape, pack_bits(codes.reshape(shape), scheme.bits), scale, minimum=minimum, codebook=book)


def level(kind: str, codes: Tensor, step: Tensor) -> QTensor:
    """Scales or minima of a type: codes uint8 [rows, superblocks, groups] times steps [rows, superblocks]."""
    scheme = SCHEMES[kind][1]
    flat = codes.flatten(1)
    zero = None if scheme.symmetric else torch.zeros_like(step, dtype=torch.uint8)
    return QTensor(scheme, tuple(flat.shape), pack_bits(flat, scheme.bits), step, zero)


def _levels(record: QTensor) -> tuple[Tensor, Tensor | No]:
    """Codes of scales, uint8 [rows, superblocks, groups], and the bytes of their steps."""
    scale = record.scale
    assert isinstance(scale, QTensor)
    return scale.unpacked().unflatten(1, (-1, scale.scheme.group_size)), half_bytes(scale.scale)


def _minima(record: QTensor) -> tuple[Tensor, Tensor | No]:
    """As `_levels`, of the minima; their step is stored positive."""
    minimum = record.minimum
    assert isinstance(minimum, QTensor)
    assert isinstance(minimum.scale, Tensor)
    return minimum.unpacked().unflatten(1, (-1, minimum.scheme.group_size)), half_bytes(-minimum.scale)


def _codes(record: QTensor) -> Tensor:
    found: Tensor = record.unpacked().unflatten(1, (-1, SUPERBLOCK))
    return found


def _quarters(data: Tensor, pieces: int) -> Tensor:
    """2-bit codes: in each piece of bytes its lowest pairs of bits, then the next; uint8 [..., 4 * bytes]."""
    found: Tensor = (data.unflatten(-1, (pieces, 1, -1)) >> _QUARTERS[:, None] & 3).flatten(-3)
    return found


def _quarter_bytes(codes: Tensor, pieces: int) -> Tensor:
    found: Tensor = (
        ((codes & 3).unflatten(-1, (pieces, 4, -1)) << _QUARTERS[:, None]).sum(-2, dtype=torch.uint8).flatten(-2)
    )
    return found


def _halves(data: Tensor, pieces: int) -> Tensor:
    """4-bit codes: in each piece of bytes its low halves, then the high ones; uint8 [..., 2 * bytes]."""
    found: Tensor = (data.unflatten(-1, (pieces, 1, -1)) >> _QUARTERS[::2, None] & 15).flatten(-3)
    return found


def _half_codes(codes: Tensor, pieces: int) -> Tensor:
    low, high = codes.unflatten(-1, (pieces, 2, -1)).unbind(-2)
    found: Tensor = ((low & 15) | (high << 4)).flatten(-2)
    return found


def _top_bits(data: Tensor) -> Tensor:
    """Bit i of byte j belongs to value j of the i-th 32; uint8 [..., 256] of 0 and 1."""
    return (data[..., None, :] >> _EIGHTHS[:, None] & 1).flatten(-2)


def _top_bytes(bits: Tensor) -> Tensor:
    found: Tensor = (bits.unflatten(-1, (8, 32)) << _EIGHTHS[:, None]).sum(-2, dtype=torch.uint8)
    return found


def _read_q2(b: Tensor, shape: Shape) -> QTensor:
    """Bytes: 16 of scale and minimum, 64 of codes, step, step of minima."""
    scale, minimum = level("Q2_K", b[..., :16] & 15, half(b, 80)), level("Q2_K", b[..., :16] >> 4, -half(b, 82))
    return _record("Q2_K", shape, _quarters(b[..., 16:80], 2), scale, minimum)


def _write_q2(q: QTensor) -> Tensor | No:
    (scales, step), (minima, other) = _levels(q), _minima(q)
    return joined([scales | minima << 4, _quarter_bytes(_codes(q), 2), step, other])


def _read_q3(b: Tensor, shape: Shape) -> QTensor:
    """Bytes: 32 of third bits, 64 of the other two, 12 of scales, the step."""
    codes = _quarters(b[..., 32:96], 2) | _top_bits(b[..., :32]) << 2
    scales = _halves(b[..., 96:104], 1) | _quarters(b[..., 104:108], 1) << 4
    return _record("Q3_K", shape, codes, level("Q3_K", scales, half(b, 108)))


def _write_q3(q: QTensor) -> Tensor | No:
    codes, (scales, step) = _codes(q), _levels(q)
    packed = [_half_codes(scales, 1), _quarter_bytes(scales >> 4, 1)]
    return joined([_top_bytes(codes >> 2), _quarter_bytes(codes, 2), *packed, step])


def _read_twelve(data: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit codes of eight scales and eight minima in 12 bytes: those of groups 4 to 7 are in two places."""
    low, high, rest = data.split(4, -1)
    scales = torch.cat([low & 63, (rest & 15) | (low >> 6 << 4)], dim=-1)
    return scales, torch.cat([high & 63, (rest >> 4) | (high >> 6 << 4)], dim=-1)


def _twelve(scales: Tensor, minima: Tensor) -> Tensor:
    rest = (scales[..., 4:] & 15) | (minima[..., 4:] << 4)
    return torch.cat([part[..., :4] | part[..., 4:] >> 4 << 6 for part in (scales, minima)] + [rest], dim=-1)


def _read_q45(kind: str, b: Tensor, shape: Shape) -> QTensor:
    """Bytes: step, step of minima, 12 of their codes, 32 of fifth bits (Q5_K), 128 of which each 32 hold two groups."""
    scales, minima = _read_twelve(b[..., 4:16])
    codes = _halves(b[..., -128:], 4)
    if kind == "Q5_K":
        codes = codes | _top_bits(b[..., 16:48]) << 4
    return _record(kind, shape, codes, level(kind, scales, half(b, 0)), level(kind, minima, -half(b, 2)))


def _write_q45(kind: str, q: QTensor) -> Tensor | No:
    codes, (scales, step), (minima, other) = _codes(q), _levels(q), _minima(q)
    fifth: list[Tensor | No] = [_top_bytes(codes >> 4)] if kind == "Q5_K" else []
    return joined([step, other, _twelve(scales, minima), *fifth, _half_codes(codes, 4)])


def _read_q6(b: Tensor, shape: Shape) -> QTensor:
    """Bytes: 128 of low halves, 64 of high quarters, 16 signed scales, the step; in two runs of 128 values each."""
    codes = _halves(b[..., :128], 2) | _quarters(b[..., 128:192], 2) << 4
    return _record("Q6_K", shape, codes, level("Q6_K", b[..., 192:208] ^ 128, half(b, 208)))


def _write_q6(q: QTensor) -> Tensor | No:
    codes, (scales, step) = _codes(q), _levels(q)
    return joined([_half_codes(codes, 2), _quarter_bytes(codes >> 4, 2), scales ^ 128, step])


def _read_iq4(b: Tensor, shape: Shape) -> QTensor:
    """Bytes: the step, 2 and 4 of the high and low parts of scales, 128 of which each 16 hold a group."""
    high = (b[..., 2:4, None] >> _QUARTERS & 3).flatten(-2)
    low = (b[..., 4:8, None] >> _QUARTERS[::2] & 15).flatten(-2)
    return _record("IQ4_XS", shape, _halves(b[..., 8:], 8), level("IQ4_XS", low | high << 4, half(b, 0)))


def _write_iq4(q: QTensor) -> Tensor | No:
    codes, (scales, step) = _codes(q), _levels(q)
    high = ((scales >> 4).unflatten(-1, (2, 4)) << _QUARTERS).sum(-1, dtype=torch.uint8)
    low = ((scales & 15).unflatten(-1, (4, 2)) << _QUARTERS[::2]).sum(-1, dtype=torch.uint8)
    return joined([step, high, low, nibble_bytes(codes.unflatten(-1, (8, 32))).flatten(-2)])


# Of the codes, and of the scales.
SCHEMES = {
    name: (Scheme.parse(codes), Scheme.parse(scales))
    for name, codes, scales in (
        ("Q2_K", "int2:g16:asym", "int4:g16:asym"),
        ("Q3_K", "int3:g16:sym", "int6:g16:sym"),
        ("Q4_K", "int4:g32:asym", "int6:g8:asym"),
        ("Q5_K", "int5:g32:asym", "int6:g8:asym"),
        ("Q6_K", "int6:g16:sym", "int8:g16:sym"),
        ("IQ4_XS", "nf4:g32:sym", "int6:g8:sym"),
    )
}
KINDS = (
    Kind("Q2_K", SUPERBLOCK, 84, SCHEMES["Q2_K"][0], _read_q2, _write_q2, SCHEMES["Q2_K"][1], minima=True),
    Kind("Q3_K", SUPERBLOCK, 110, SCHEMES["Q3_K"][0], _read_q3, _write_q3, SCHEMES["Q3_K"][1]),
    *(
        Kind(
            name,
            SUPERBLOCK,
            nbytes,
            SCHEMES[name][0],
            lambda blocks, shape, name=name: _read_q45(name, blocks, shape),  # type: ignore[misc]
            lambda record, name=name: _write_q45(name, record),  # type: ignore[misc]
            SCHEMES[name][1],
            minima=True,
        )
        for name, nbytes in (("Q4_K", 144), ("Q5_K", 176))
    ),
    Kind("Q6_K", SUPERBLOCK, 210, SCHEMES["Q6_K"][0], _read_q6, _write_q6, SCHEMES["Q6_K"][1]),
    Kind("IQ4_XS", SUPERBLOCK, 136, SCHEMES["IQ4_XS"][0], _read_iq4, _write_iq4, SCHEMES["IQ4_XS"][1], codebook=IQ4),
)
BYTES = {kind.name: kind.nbytes for kind in KINDS}
