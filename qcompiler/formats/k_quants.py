"""GGUF's k-quants as QTensors: scales of two levels, as llama.cpp's Q4_K and Q6_K store them.

A superblock is 256 neighbouring values of a row. Q4_K: eight groups of 32, whose scales and minima are 6-bit codes of
one float16 step each. Q6_K: sixteen groups of 16, whose scales are signed 8-bit codes of one float16 step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.scheme import QTensor, Scheme, pack_bits

SUPERBLOCK = 256
BYTES = {"Q4_K": 144, "Q6_K": 210}


def decode(kind: str, data: Tensor, shape: tuple[int, int]) -> QTensor:
    """The record of a matrix stored as Q4_K or Q6_K: `data` uint8, the bytes of its blocks, row by row."""
    blocks = data.view(shape[0], shape[1] // SUPERBLOCK, BYTES[kind])
    return _DECODERS[kind](blocks, shape)


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _q4_k(blocks: Tensor, shape: tuple[int, int]) -> QTensor:
    """Bytes: step and step of minima, 12 of 6-bit codes, 128 of which each 32 hold two groups."""
    packed = blocks[..., 4:16]
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat([low & 63, (rest & 15) | (low >> 6 << 4)], dim=-1)
    minimum = torch.cat([high & 63, (rest >> 4) | (high >> 6 << 4)], dim=-1)
    pairs = blocks[..., 16:].unflatten(-1, (4, 1, 32))
    codes = torch.cat([pairs & 15, pairs >> 4], dim=-2)
    return QTensor(
        Scheme.parse("int4:g32:asym"),
        shape,
        pack_bits(codes.reshape(shape), 4),
        _from_zero(scale, _half(blocks, 0)),
        minimum=_from_zero(minimum, -_half(blocks, 2)),
    )


def _from_zero(codes: Tensor, step: Tensor) -> QTensor:
    """6-bit codes [rows, superblocks, 8] times a step [rows, superblocks]."""
    flat = codes.flatten(1)
    zero = torch.zeros_like(step, dtype=torch.uint8)
    return QTensor(Scheme.parse("int6:g8:asym"), tuple(flat.shape), pack_bits(flat, 6), step, zero)


def _q6_k(blocks: Tensor, shape: tuple[int, int]) -> QTensor:
    """Bytes: 128 of low halves, 64 of high quarters, 16 signed scales, the step; in two runs of 128 values each."""
    low = blocks[..., :128].unflatten(-1, (2, 1, 64))
    low = torch.cat([low & 15, low >> 4], dim=-2).flatten(-2)
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-2)
    codes = pack_bits((low | high << 4).reshape(shape), 6)
    scales = blocks[..., 192:208].flatten(1) ^ 128
    scheme = Scheme.parse("int8:g16:sym")
    scale = QTensor(scheme, tuple(scales.shape), pack_bits(scales, 8), _half(blocks, 208))
    return QTensor(Scheme.parse("int6:g16:sym"), shape, codes, scale)


_DECODERS: dict[str, Callable[[Tensor, tuple[int, int]], QTensor]] = {"Q4_K": _q4_k, "Q6_K": _q6_k}
