"""Codes of any few bits as one stream of bytes for each row: how `QTensor` stores them."""

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes (uint8 [rows, columns]) into one bit stream per row, least significant bit first.

    Returns uint8 [rows, ceil(columns * bits / 8)]; `unpack_bits` inverts it.

    >>> pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
    tensor([[33,  3]], dtype=torch.uint8)
    """
    rows, columns = codes.shape
    if bits == 8:
        return codes.clone()
    # Eight codes of b bits fill exactly b bytes, whatever b is. All in bytes, one code or byte of each eight a plane.
    words = -(-columns // 8)
    planes = torch.nn.functional.pad(codes, (0, -columns % 8)).view(rows, words, 8).permute(2, 0, 1).contiguous()
    stream = torch.zeros(bits, rows, words, dtype=torch.uint8, device=codes.device)
    for i, plane in enumerate(planes):
        byte, shift = divmod(i * bits, 8)
        stream[byte] |= plane << shift
        if shift + bits > 8:
            stream[byte + 1] |= plane >> (8 - shift)
    return stream.permute(1, 2, 0).flatten(1)[:, : -(-columns * bits // 8)].contiguous()


def unpack_bits(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (uint8 [rows, columns]) of a bit stream made by `pack_bits`.

    >>> unpack_bits(torch.tensor([[33, 3]], dtype=torch.uint8), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    rows = stream.shape[0]
    if bits == 8:
        return stream[:, :columns]
    words, mask = -(-columns // 8), (1 << bits) - 1
    padded = torch.nn.functional.pad(stream, (0, words * bits - stream.shape[1]))
    planes = padded.view(rows, words, bits).permute(2, 0, 1).contiguous()
    codes = torch.empty(8, rows, words, dtype=torch.uint8, device=stream.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        codes[i] = planes[byte] >> shift
        if shift + bits > 8:
            codes[i] |= planes[byte + 1] << (8 - shift)
    return codes.bitwise_and_(mask).permute(1, 2, 0).flatten(1)[:, :columns]
