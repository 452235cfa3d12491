"""AWQ checkpoints, as AutoAWQ stores them: 4 bits, asymmetric; W = (code - zero) * scale.

| kind | `qweight` int32 | `qzeros` int32 | `scales` float16 |
|---|---|---|---|
| gemm | [k, n / 8], nibble i of a word holds column `ORDER[i]` of eight | [groups, n / 8], likewise | [groups, n] |
| gemv | [n, k / 8], columns in their order | [n, w], filled up with zeros | [n, 8 w] |

Sources: AutoAWQ (`WQLinear_GEMM`, `WQLinear_GEMV`); the method is arXiv 2306.00978.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import InputError, No
from qcompiler.formats.checkpoint import (
    Checkpoint,
    Format,
    by_rounding,
    integer,
    lazily,
    method_is,
    open_folder,
    quantization_of,
)
from qcompiler.formats.folder import (
    SHARD_BYTES,
    Uniform,
    finite,
    half_scales,
    plain_integers,
    refuse_roundings,
    write_folder,
    zeros,
)
from qcompiler.formats.shards import Shards
from qcompiler.formats.words import from_words, to_words
from qcompiler.scheme import QTensor, Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales")


def detect(folder: Path, kind: str) -> bool | No:
    """Whether the folder is an AWQ checkpoint of that kind."""
    answer = method_is(folder, "awq")
    if not answer:
        return answer
    options = quantization_of(folder)
    found = str(options.get("version", "gemm")).lower() if isinstance(options, dict) else ""
    return found == kind or No(f"its version is {found}")


def read(folder: Path) -> Checkpoint:
    """The checkpoint; every quantized layer is a QTensor. InputError says what is wrong with the folder."""
    config, options, shards = open_folder(folder)
    integer(options, "bits", (4,), folder)
    group = integer(options, "group_size", range(-1, 2**24), folder)
    kind = str(options.get("version", "gemm")).lower()
    unpack = {"gemm": _unpack_gemm, "gemv": _unpack_gemv}.get(kind)
    if unpack is None:
        raise InputError(f'"{folder}": AWQ version {kind!r} is not read; gemm and gemv are')
    layers = [name.removesuffix(".qweight") for name in shards if name.endswith(".qweight")]

    def weight(layer: str) -> QTensor:
        codes, zero, scale = unpack(folder, shards, layer, group)
        finite(scale, f"{layer}.scales", folder)
        size = group if 0 < group < codes.shape[1] else 0
        scheme = Scheme.parse(f"int4:{f'g{size}' if size else 'channel'}:asym")
        scale = scale if scale.dtype == torch.float16 else scale.float()
        return QTensor(scheme, tuple(codes.shape), pack_bits(codes, 4), scale.contiguous(), zero.contiguous())

    return Checkpoint(config, lazily(shards, layers, PARTS, weight), folder)


def _check(folder: Path, shards: Shards, layer: str, wanted: Mapping[str, tuple[int, ...]], sound: bool) -> None:
    """InputError where the tensors of a layer do not fit together."""
    found = {part: shards.shape(f"{layer}.{part}") for part in PARTS}
    kinds = tuple(shards.dtype(f"{layer}.{part}") for part in PARTS)
    if not sound or found != wanted or kinds[:2] != ("I32", "I32") or kinds[2] not in ("F16", "BF16", "F32"):
        raise InputError(f'"{folder}": the tensors of "{layer}" do not fit together: {found} {kinds}, not {wanted}')


def _sizes(shards: Shards, layer: str) -> tuple[int, int]:
    shape = shards.shape(f"{layer}.qweight")
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)


def _unpack_gemm(folder: Path, shards: Shards, layer: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k], zero points and scales [n, groups]."""
    k, words = _sizes(shards, layer)
    n, size = 8 * words, group if group > 0 else k
    groups = k // size if size else 0
    wanted = {"qweight": (k, words), "qzeros": (groups, words), "scales": (groups, n)}
    _check(folder, shards, layer, wanted, sound=k * n > 0 and k % size == 0)
    codes, zero = (_in_order(shards.get(f"{layer}.{part}"), n) for part in ("qweight", "qzeros"))
    return codes.T.contiguous(), zero.T, shards.get(f"{layer}.scales").T


def _in_order(words: Tensor, n: int) -> Tensor:
    """The columns, uint8 [rows, n], of words whose nibbles are mixed."""
    mixed = from_words(words, 4, n).view(words.shape[0], -1, 8)
    return mixed[..., torch.argsort(torch.tensor(ORDER))].flatten(1)


def _unpack_gemv(folder: Path, shards: Shards, layer: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    n, words = _sizes(shards, layer)
    k = 8 * words
    size = group if group > 0 else k
    width = gemv_width(k, size) if size in range(32, k + 1) else 0
    wanted = {"qweight": (n, words), "qzeros": (n, width), "scales": (n, 8 * width)}
    _check(folder, shards, layer, wanted, sound=k * n * width > 0 and k % size == 0)
    zero = from_words(shards.get(f"{layer}.qzeros"), 4, k // size)
    return from_words(shards.get(f"{layer}.qweight"), 4, k), zero, shards.get(f"{layer}.scales")[:, : k // size]


def gemv_width(k: int, group: int) -> int:
    """Words of zero points in a row of the gemv layout.

    >>> gemv_width(4096, 128), gemv_width(576, 64), gemv_width(576, 32)
    (4, 2, 4)
    """
    multiple = 1 if group >= 128 else 2 if group >= 64 else 4
    words = (k // group + 7) // 8
    return (words + multiple - 1) // multiple * multiple


def holds(record: QTensor, kind: str) -> bool | No:
    """Whether the format stores this weight exactly."""
    answer = plain_integers(record, (4,))
    if not answer:
        return answer
    n, k = record.shape
    size = record.scheme.group_of(k)
    if n % 8 or k % 8 or k % size:
        return No(f"its shape {n} x {k} is not made of words of 8 and groups of {size}")
    if kind == "gemv" and size not in (32, 64, 128) and size != k:
        return No(f"gemv has groups of 32, 64 or 128, not {size}")
    if record.permutation is not None:
        return No("its channels are stored in another order (act-order), and AWQ has no place to say so")
    scales = half_scales(record)
    return scales if isinstance(scales, No) else True


def pack(layer: str, record: QTensor, kind: str) -> dict[str, Tensor]:
    """The tensors of a layer; InputError if the format cannot hold it."""
    answer, scales = holds(record, kind), half_scales(record)
    if isinstance(answer, No) or isinstance(scales, No):
        raise InputError(f'"{layer}" cannot be stored as AWQ {kind}: {answer if not answer else scales}')
    codes, zero = record.unpacked(), zeros(record)
    if kind == "gemm":
        return {
            f"{layer}.qweight": to_words(_mixed(codes.T), 4),
            f"{layer}.qzeros": to_words(_mixed(zero.T), 4),
            f"{layer}.scales": scales.T.contiguous(),
        }
    width = gemv_width(record.columns, record.scheme.group_of(record.columns))
    room = (0, 8 * width - zero.shape[1])
    return {
        f"{layer}.qweight": to_words(codes.contiguous(), 4),
        f"{layer}.qzeros": to_words(torch.nn.functional.pad(zero, room), 4),
        f"{layer}.scales": torch.nn.functional.pad(scales, room),
    }


def _mixed(columns: Tensor) -> Tensor:
    """Columns [rows, n] as the words of gemm want them."""
    return columns.reshape(columns.shape[0], -1, 8)[..., list(ORDER)].flatten(1).contiguous()


def write(checkpoint: Checkpoint, folder: Path, kind: str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that AutoAWQ, transformers, vLLM and TGI load; InputError for what it cannot hold."""
    same = Uniform("an AWQ checkpoint")
    refuse_roundings(checkpoint, "an AWQ checkpoint")

    def layer(name: str, record: QTensor) -> dict[str, Tensor]:
        same.see(name, record)
        return pack(name.removesuffix(".weight"), record, kind)

    def options() -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": same.known.group_size or -1,
            "zero_point": True,
            "version": kind,
            "modules_to_not_convert": same.left_out(checkpoint),
        }

    write_folder(checkpoint, folder, layer, options, shard_bytes=shard_bytes)


def _format(kind: str, name: str, sizes: str) -> Format:
    return Format(
        name,
        partial(detect, kind=kind),
        read,
        partial(write, kind=kind),
        partial(holds, kind=kind),
        by_rounding("int4:g128:asym"),
        True,
        f"integers of 4 bits, {sizes}, float16 scales; one scheme for all",
    )


FORMATS = (
    _format("gemm", "awq", "groups or channels"),
    _format("gemv", "awq-gemv", "groups of 32, 64, 128 or channels"),
)
