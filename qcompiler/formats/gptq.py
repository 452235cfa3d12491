"""GPTQ checkpoints, as AutoGPTQ and GPTQModel store them: 2, 3, 4 and 8 bits, version 1 and 2.

| tensor of a layer | holds |
|---|---|
| `qweight` | int32 [k * bits / 32, n], the codes of a row of the weight below each other (words.py) |
| `qzeros` | int32 [groups, n * bits / 32]; version 1 ("gptq") stores the zero points less 1, version 2 as they are |
| `scales` | float16 [groups, n] |
| `g_idx` | int32 [k], the group of each channel; with act-order of dynamic groups that is a QTensor's permutation |

Version 1 cannot say zero 0, and readers disagree about its field of ones (PyTorch reads 2 ** bits, CUDA kernels 0):
both are refused. Sources: AutoGPTQ, GPTQModel; the method is arXiv 2210.17323.
"""

import re
from collections.abc import Mapping, Sequence
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
from qcompiler.formats.words import from_words, to_words, word_count
from qcompiler.scheme import QTensor, Scheme

BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {1: "gptq", 2: "gptq_v2"}


def detect(folder: Path, version: int) -> bool | No:
    """Whether the folder is a GPTQ checkpoint of that version."""
    answer = method_is(folder, "gptq")
    if not answer:
        return answer
    found = quantization_of(folder)
    kind = found.get("checkpoint_format", "gptq") if isinstance(found, dict) else None
    return kind == VERSIONS[version] or No(f"its checkpoint_format is {kind!r}")


def read(folder: Path) -> Checkpoint:
    """The checkpoint; every quantized layer is a QTensor. InputError says what is wrong with the folder."""
    config, options, shards = open_folder(folder)
    layout = _Layout.of(folder, options)
    layers = [name.removesuffix(".qweight") for name in shards if name.endswith(".qweight")]
    return Checkpoint(config, lazily(shards, layers, PARTS, partial(layout.unpack, shards)), folder)


class _Layout:
    """What the configuration says about all layers."""

    def __init__(self, folder: Path, bits: int, group: int, symmetric: bool, version: int) -> None:
        self.folder, self.bits, self.group, self.symmetric, self.version = folder, bits, group, symmetric, version

    @classmethod
    def of(cls, folder: Path, options: Mapping[str, Any]) -> "_Layout":
        kind = options.get("checkpoint_format", "gptq")
        version = next((number for number, name in VERSIONS.items() if name == kind), 0)
        if not version:
            raise InputError(f'"{folder}": checkpoint_format {kind!r} is not read; gptq and gptq_v2 are')
        bits = integer(options, "bits", BITS, folder)
        group = integer(options, "group_size", range(-1, 2**24), folder)
        return cls(folder, bits, group, options.get("sym") is not False, version)

    def unpack(self, shards: Shards, layer: str) -> QTensor:
        """One layer's weight [n, k]."""
        words, scales = f"{layer}.qweight", f"{layer}.scales"
        k, n = self._sizes(shards, layer)
        groups = shards.shape(scales)[0]
        codes = from_words(shards.get(words).T, self.bits, k)
        zero = self._zeros(shards.get(f"{layer}.qzeros"), n, layer).T.contiguous()
        scale = finite(shards.get(scales), scales, self.folder).T
        scale = (scale if scale.dtype == torch.float16 else scale.float()).contiguous()
        order = self._order(shards, layer, k, groups)
        if order is not None:
            codes = codes[:, order.long()]
        symmetric = self.symmetric and bool((zero == 1 << (self.bits - 1)).all())
        group = f"g{self.group}" if 0 < self.group < k else f"g{k}" if self.group > 0 else "channel"
        scheme = Scheme.parse(f"int{self.bits}:{group}:{'sym' if symmetric else 'asym'}")
        stream = pack_bits(codes, self.bits)
        return QTensor(scheme, (n, k), stream, scale, None if symmetric else zero, permutation=order)

    def _sizes(self, shards: Shards, layer: str) -> tuple[int, int]:
        """Length k of the rows and their number n; InputError where the tensors do not fit together."""
        shapes = {part: shards.shape(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales")}
        kinds = {part: shards.dtype(f"{layer}.{part}") for part in shapes}
        rows, n = shapes["qweight"] if len(shapes["qweight"]) == 2 else (0, 0)
        k = rows * 32 // self.bits
        groups = -(-k // self.group) if self.group > 0 and k else 1
        wanted = {"qweight": (rows, n), "qzeros": (groups, word_count(n, self.bits)), "scales": (groups, n)}
        if not n or not k or rows * 32 % self.bits or shapes != wanted:
            raise InputError(f'"{self.folder}": the tensors of "{layer}" do not fit together: {shapes}, not {wanted}')
        if (kinds["qweight"], kinds["qzeros"]) != ("I32", "I32") or kinds["scales"] not in ("F16", "BF16", "F32"):
            raise InputError(f'"{self.folder}": the tensors of "{layer}" have the wrong types {kinds}')
        return k, n

    def _zeros(self, words: Tensor, n: int, layer: str) -> Tensor:
        """The zero points, uint8 [groups, n]."""
        stored = from_words(words, self.bits, n)
        if self.version == 2:
            return stored
        if bool((stored == (1 << self.bits) - 1).any()):
            raise InputError(
                f'"{self.folder}": "{layer}.qzeros" has fields of ones, which readers of version 1 take for '
                f"{1 << self.bits} or for 0; get it as gptq_v2"
            )
        return stored + 1

    def _order(self, shards: Shards, layer: str, k: int, groups: int) -> Tensor | None:
        """The channels in stored order, int32 [k]; None where groups are runs of neighbours."""
        name = f"{layer}.g_idx"
        if name not in shards:
            return None
        index = shards.get(name)
        size = self.group if self.group > 0 else k
        plain = torch.arange(k) // size
        if index.shape != (k,) or index.dtype not in (torch.int32, torch.int64):
            raise InputError(f'"{self.folder}": "{name}" is {index.dtype} {list(index.shape)}, not int32 [{k}]')
        if torch.equal(index.long(), plain):
            return None
        order = torch.argsort(index, stable=True)
        if not torch.equal(index.long()[order], plain):
            raise InputError(f'"{self.folder}": "{name}" does not put {size} channels into each of {groups} groups')
        return order.to(torch.int32)


def holds(record: QTensor, version: int) -> bool | No:
    """Whether the format stores this weight exactly."""
    answer = plain_integers(record, BITS)
    if not answer:
        return answer
    n, k = record.shape
    if n % 32 or k % 32:
        return No(f"its shape is {n} x {k}, no multiples of 32")
    scales = half_scales(record)
    if isinstance(scales, No):
        return scales
    if record.permutation is not None and not _restorable(record):
        return No("its stored order is not that of GPTQ's groups")
    if version == 1 and record.zero is not None and bool((record.zero == 0).any()):
        return No("it has zero points of 0, which version 1 cannot say; gptq-v2 can")
    return True


def _restorable(record: QTensor) -> bool:
    """Whether g_idx says all about the order: channels ascend inside each group."""
    assert record.permutation is not None
    return torch.equal(torch.argsort(_group_index(record), stable=True), record.permutation.long())


def _group_index(record: QTensor) -> Tensor:
    """g_idx, int32 [k]: the group of each channel."""
    groups = record.group_index().to(torch.int32)
    if record.permutation is None:
        return groups
    return torch.empty_like(groups).index_copy_(0, record.permutation.long(), groups)


def pack(layer: str, record: QTensor, version: int) -> dict[str, Tensor]:
    """The tensors of a layer; InputError if the format cannot hold it."""
    answer = holds(record, version)
    scales = half_scales(record)
    if isinstance(answer, No) or isinstance(scales, No):
        raise InputError(f'"{layer}" cannot be stored as {VERSIONS[version]}: {answer if not answer else scales}')
    codes, bits = record.unpacked(), record.scheme.bits
    if record.permutation is not None:
        codes = codes[:, torch.argsort(record.permutation)]
    stored = (zeros(record) - (1 if version == 1 else 0)).T.contiguous()
    return {
        f"{layer}.qweight": to_words(codes.contiguous(), bits).T.contiguous(),
        f"{layer}.qzeros": to_words(stored, bits),
        f"{layer}.scales": scales.T.contiguous(),
        f"{layer}.g_idx": _group_index(record),
    }


def write(checkpoint: Checkpoint, folder: Path, version: int, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that GPTQModel, transformers, vLLM and TGI load; InputError for what it cannot hold."""
    same = Uniform("a GPTQ checkpoint")
    reordered: list[str] = []
    refuse_roundings(checkpoint, "a GPTQ checkpoint")

    def layer(name: str, record: QTensor) -> dict[str, Tensor]:
        same.see(name, record)
        reordered.extend([name] if record.permutation is not None else [])
        return pack(name.removesuffix(".weight"), record, version)

    def options() -> dict[str, Any]:
        scheme = same.known
        return {
            "quant_method": "gptq",
            "checkpoint_format": VERSIONS[version],
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "desc_act": bool(reordered),
            "static_groups": False,
            "sym": same.symmetric,
            "lm_head": False,
            "true_sequential": True,
            **_skipping(same.left_out(checkpoint)),
        }

    write_folder(checkpoint, folder, layer, options, beside="quantize_config.json", shard_bytes=shard_bytes)


def _skipping(layers: Sequence[str]) -> dict[str, Any]:
    """How GPTQModel and vLLM are told of layers that stayed floats; the head is one without a word."""
    rules: dict[str, Any] = {f"-:^{re.escape(layer)}$": {} for layer in layers if layer != "lm_head"}
    return {"dynamic": rules} if rules else {}


def _format(version: int, name: str, zero_points: str) -> Format:
    return Format(
        name,
        partial(detect, version=version),
        read,
        partial(write, version=version),
        partial(holds, version=version),
        by_rounding("int4:g128:sym"),
        True,
        f"integers of 2, 3, 4 or 8 bits, groups or channels, float16 scales, {zero_points}, act-order; "
        "sizes in multiples of 32; one scheme for all",
    )


FORMATS = (_format(1, "gptq", "zero points from 1"), _format(2, "gptq-v2", "any zero points"))
