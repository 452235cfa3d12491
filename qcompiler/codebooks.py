"""Codebooks over blocks, as bitsandbytes defines them: NF4, FP4, the 8-bit dynamic map, and quantized block scales.

Source: bitsandbytes; QLoRA (arXiv 2305.14314); the 8-bit map: arXiv 1511.04561 and 2110.02861.
"""

import functools

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import InputError, RecipeError
from qcompiler.rounding import NF4
from qcompiler.scheme import QTensor, Scheme, by_group

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # scales that share a scale in double quantization
STEPS = 65535 / 2  # of the table of codes, from -1 to 0
TINY = 1e-38  # what a block of zeros is divided by

# A sign, two bits of exponent, one of fraction; the code is the bit pattern, so that the values do not ascend.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@functools.cache
def codebook(kind: str) -> Tensor:
    """The 16 values of nf4 or fp4, float32, the largest magnitude 1.

    >>> codebook("fp4")[:4]
    tensor([0.0000, 0.0052, 0.6667, 1.0000])
    """
    if kind not in ("nf4", "fp4"):
        raise RecipeError(f'there is no codebook "{kind}"; nf4 and fp4 are known')
    if kind == "nf4":
        return torch.tensor(NF4)
    return torch.tensor([*_FP4, *(-value for value in _FP4)]) / max(_FP4)


@functools.cache
def dynamic_map() -> Tensor:
    """The 8-bit dynamic map, float32 [256] ascending: the fewer leading zero bits, the more bits for the fraction.

    >>> dynamic_map()[[0, 127, 255]]
    tensor([-0.9930,  0.0000,  1.0000])
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (exponent - 6) * middles).tolist() + (-(10 ** (exponent - 6)) * middles).tolist()
    return torch.tensor(sorted(values))


@functools.cache
def float8_map() -> Tensor:
    """The values of float8_e4m3fn by their bits, float32 [256]; the two that are no numbers stand as zeros.

    >>> float8_map()[[0, 1, 0x38, 0x7E, 0x7F]]
    tensor([0.0000e+00, 1.9531e-03, 1.0000e+00, 4.4800e+02, 0.0000e+00])
    """
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)


def quantize_blocks(weight: Tensor, kind: str, block: int, double: bool = False) -> QTensor:
    """The nearest codes of `kind` (nf4, fp4) in blocks of the flattened weight, each scaled by its largest magnitude.

    Where blocks do not cross rows the record has groups in its rows, otherwise its axis is None. `double` quantizes
    the scales too (`nested`). Codes and scales are bitsandbytes' to the bit.

    >>> q = quantize_blocks(torch.linspace(-1, 1, 64).view(2, 32), "nf4", 32)
    >>> str(q.scheme), q.scale.flatten().tolist()
    ('nf4:g32:sym', [1.0, 1.0])
    """
    values = _checked(weight, block)
    table = codebook(kind)
    order = torch.argsort(table)
    scaled, absmax = _scaled(values, block)
    middles = (table[order[:-1]] + table[order[1:]]) / 2
    codes = order[torch.bucketize(scaled, middles)].to(torch.uint8)
    return _record(weight, f"{kind}:g{block}", codes, absmax, table, double)


def quantize_dynamic(weight: Tensor, block: int) -> QTensor:
    """The codes of `weight` in the 8-bit dynamic map, in blocks of the flattened weight as `quantize_blocks` cuts them.

    Codes and scales are bitsandbytes' (`quantize_blockwise`) to the bit.

    >>> quantize_dynamic(torch.tensor([[1.0, -1.0] * 16]), 32).dequantize()[0, :2]
    tensor([ 1.0000, -0.9930])
    """
    runs = by_group(_checked(weight, block)[None], block)[0]
    absmax = runs.abs().amax(-1)
    codes = _dynamic_codes(runs, absmax)[: weight.numel()]
    return _record(weight, f"nf8:g{block}", codes, absmax, dynamic_map())


def _checked(weight: Tensor, block: int) -> Tensor:
    """The values of a weight that can be quantized in such blocks, float32 [n]."""
    if block not in BLOCKS:
        raise RecipeError(f"blocks of {block} values; the sizes are {', '.join(map(str, BLOCKS))}")
    if weight.numel() == 0 or not bool(torch.isfinite(weight).all()):
        raise InputError("a weight that is empty, or holds NaN or infinite values, cannot be quantized")
    return weight.detach().reshape(-1).float()


def _record(weight: Tensor, scheme: str, codes: Tensor, absmax: Tensor, table: Tensor, double: bool = False) -> QTensor:
    """The record of codes uint8 [n] and scales [blocks] of a flattened weight."""
    kind = Scheme.parse(scheme)
    by_row = weight.dim() == 2 and weight.shape[1] % kind.group_size == 0
    rows = weight.shape[0] if by_row else 1
    scale = nested(absmax.view(rows, -1)) if double else absmax.view(rows, -1)
    packed = pack_bits(codes.view(rows, -1), kind.bits)
    axis = -1 if by_row else None
    return QTensor(kind, tuple(weight.shape), packed, scale, codebook=table, dtype=weight.dtype, axis=axis)


def nested(absmax: Tensor) -> QTensor:
    """Scales [rows, blocks], quantized: less their mean, in runs of 256, by the 8-bit dynamic map."""
    offset = absmax.reshape(-1).mean()
    values = absmax.reshape(-1) - offset
    runs = by_group(values[None], NESTED)[0]
    scale = runs.abs().amax(-1)
    codes = _dynamic_codes(runs, scale)[: values.numel()]
    return nested_record(tuple(absmax.shape), codes, scale, dynamic_map(), offset)


def _dynamic_codes(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Codes in the 8-bit dynamic map, uint8 [n], of values [blocks, block] and their largest magnitudes [blocks]."""
    table = dynamic_map()
    # bitsandbytes' CPU library multiplies by the inverse, and looks codes up by the value in 16 bits, which now and
    # then is not the nearest one.
    steps = torch.floor((blocks * (1 / absmax[:, None]) + 1) * STEPS + 0.5) / STEPS - 1
    codes = torch.bucketize(steps, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    codes[absmax == 0] = 0
    return codes.flatten()


def nested_record(shape: tuple[int, ...], codes: Tensor, scale: Tensor, table: Tensor, offset: Tensor) -> QTensor:
    """The record of quantized scales: codes uint8 [n], scale float32 [runs], one offset for all."""
    scheme = Scheme.parse(f"fp8:g{NESTED}")
    return QTensor(
        scheme, shape, codes.view(1, -1), scale.view(1, -1), minimum=offset.view(1, 1), codebook=table, axis=None
    )


def _scaled(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Values [n] over the largest magnitude of their block, and those magnitudes [blocks]; floats as bitsandbytes'."""
    count = values.numel()
    whole = count // block * block
    absmax = by_group(values[None], block)[0].abs().amax(-1)
    factors = 1.0 / absmax.clamp(min=TINY)
    scaled = values[:whole].view(-1, block) * factors[: whole // block, None]
    parts = [scaled.flatten()]
    if whole < count:  # a short last block is divided, not multiplied by the reciprocal
        absmax[-1] = absmax[-1].clamp(min=TINY)
        parts.append(values[whole:] / absmax[-1])
    return torch.cat(parts).clamp(-1, 1), absmax
