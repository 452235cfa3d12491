"""A layer as compressed-tensors stores it: its tensors, or why it cannot be stored."""

import torch
from torch import Tensor

from qcompiler.codebooks import float8_map
from qcompiler.errors import InputError, No
from qcompiler.formats.checkpoint import Rounding
from qcompiler.formats.folder import plain_integers
from qcompiler.formats.words import to_words
from qcompiler.scheme import QTensor


def why_not(record: QTensor) -> bool | No:
    """Whether the format stores this weight exactly."""
    if record.codebook is not None:
        known = record.scheme.code == "fp" and record.scheme.bits == 8 and torch.equal(record.codebook, float8_map())
        if not known or record.permutation is not None or record.axis not in (-1, 1):
            return No(f"its codebook ({record.scheme.code}{record.scheme.bits}) is not float8_e4m3")
    elif not (answer := plain_integers(record, tuple(range(2, 9)))):
        return answer
    if record.permutation is not None:
        return No("its channels are stored in another order (act-order), which current readers refuse")
    if isinstance(record.scale, QTensor):
        return No("its scales are quantized too")
    if record.zero is not None and record.scheme.symmetric:
        return No("its scheme is symmetric, and yet it has zero points")
    size = record.scheme.group_size
    if size and record.columns % size:
        return No(f"groups of {size} do not divide its {record.columns} columns")
    return True


def pack(layer: str, record: QTensor, rounding: Rounding | None) -> dict[str, Tensor]:
    """The tensors of a layer, whose input is rounded so; InputError if the format cannot hold it."""
    answer = why_not(record)
    if isinstance(answer, No):
        raise InputError(f'"{layer}" cannot be stored as compressed-tensors: {answer}')
    assert isinstance(record.scale, Tensor)
    bits, codes = record.scheme.bits, record.unpacked()
    middle = 1 << (bits - 1)
    parts = {f"{layer}.weight_scale": record.scale.float()}
    plain = record.codebook is not None or (rounding is not None and bits == 8)
    if record.codebook is not None:
        parts[f"{layer}.weight"] = codes.contiguous().view(torch.float8_e4m3fn)
    elif plain:
        parts[f"{layer}.weight"] = (codes.to(torch.int16) - middle).to(torch.int8)
    else:
        parts[f"{layer}.weight_packed"] = to_words(codes.contiguous(), bits)
        parts[f"{layer}.weight_shape"] = torch.tensor(record.shape)
    if not record.scheme.symmetric:
        zero = _zeros(record)
        if plain or record.scheme.granularity == "tensor":
            parts[f"{layer}.weight_zero_point"] = (zero.to(torch.int16) - middle).to(torch.int8)
        else:
            parts[f"{layer}.weight_zero_point"] = to_words(zero.T.contiguous(), bits).T.contiguous()
    if rounding is not None and rounding.grid:
        parts[f"{layer}.input_scale"] = rounding.grid[0].float().reshape(-1)
        if len(rounding.grid) > 1:
            offset = 1 << (rounding.scheme.bits - 1)
            parts[f"{layer}.input_zero_point"] = (
                (rounding.grid[1].round().to(torch.int16) - offset).to(torch.int8).flatten()
            )
    return parts


def _zeros(record: QTensor) -> Tensor:
    """The zero points, uint8, like the scales."""
    assert isinstance(record.scale, Tensor)
    if record.zero is None:
        return torch.full(record.scale.shape, record.scheme.levels >> 1, dtype=torch.uint8)
    return record.zero
