"""Codes in 32-bit words, as most checkpoints store them: one bit stream, least significant bit first.

The famous patterns (eight nibbles a word, 10-1-10-1-10 values of 3 bits in three words) are all this one rule, which is
also that of `QTensor.codes`.
"""

import torch
from torch import Tensor

from qcompiler.bits import pack_bits, unpack_bits


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes, uint8 [rows, columns], as int32 [rows, ceil(columns * bits / 32)].

    >>> [hex(word) for word in to_words(torch.arange(8, dtype=torch.uint8)[None], 4)[0].tolist()]
    ['0x76543210']
    """
    stream = pack_bits(codes, bits)
    whole = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return whole.reshape(-1).view(torch.int32).view(codes.shape[0], -1)  # flat: one row may have any stride


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes, uint8 [rows, columns], in words made by `to_words`.

    >>> from_words(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 5)
    tensor([[0, 1, 2, 3, 4]], dtype=torch.uint8)
    """
    return unpack_bits(words.reshape(-1).view(torch.uint8).view(words.shape[0], -1), bits, columns)


def word_count(columns: int, bits: int) -> int:
    """Words that hold that many codes."""
    return -(-columns * bits // 32)
