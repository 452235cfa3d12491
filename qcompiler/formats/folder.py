"""Writing a checkpoint folder: configuration, tokenizer and the like, and tensors streamed into shards."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler import atomic
from qcompiler.errors import InputError, No
from qcompiler.formats.checkpoint import Checkpoint
from qcompiler.formats.shards import ShardWriter
from qcompiler.scheme import QTensor, Scheme
from qcompiler.skeleton import Skeleton

# What goes with a model and holds none of its numbers; names as transformers and tokenizers write them.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("sentencepiece*.model", "generation_config.json", "chat_template*", "preprocessor_config.json"),
)
SHARD_BYTES = 2 * 10**9

Pack = Callable[[str, QTensor], Mapping[str, Tensor]]


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    pack: Pack,
    quantization: Callable[[], Mapping[str, Any]],
    *,
    shard_bytes: int = SHARD_BYTES,
    also: Callable[[], Mapping[str, Tensor]] = dict,
    beside: str = "",
) -> None:
    """Write a checkpoint: `pack(name, record)` gives the tensors of a quantized weight by their names in the file.

    `quantization()`, asked when all tensors are written, is the quantization_config; what it says about the whole may
    so follow from the parts; `beside` is the name of a second file it goes into. `also` are tensors beside those of
    the checkpoint. Everything is read and written one tensor at a time. Raises InputError for a folder that is not
    empty, and what `pack` raises; nothing is then left.
    """
    check_empty(folder)
    try:
        with atomic.replacing(folder) as fresh:
            with ShardWriter(fresh, shard_bytes) as shards:
                for name in checkpoint.tensors:
                    value = checkpoint.tensors[name]
                    packed = pack(name, value) if isinstance(value, QTensor) else {name: value}
                    for stored, tensor in packed.items():
                        shards.add(stored, tensor)
                for stored, tensor in also().items():
                    shards.add(stored, tensor)
            write_config(fresh, {**checkpoint.config, "quantization_config": dict(quantization())})
            if beside:
                write_config(fresh, quantization(), beside)
            copy_companions(checkpoint.source, fresh)
    except OSError as error:
        raise InputError(f'"{folder}" cannot be written: {error.strerror or error}; choose another folder') from error


def check_empty(folder: Path) -> None:
    """InputError for a place that holds something already."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f'"{folder}" exists and is not empty; give the name of a new folder')


def write_config(folder: Path, config: Mapping[str, Any], name: str = "config.json") -> None:
    """A configuration as JSON."""
    (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer and other small files that go with a model; links are not followed."""
    if source is None or not source.is_dir():
        return
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not path.is_symlink() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


class Uniform:
    """The one scheme of all quantized weights, for formats that have no other; InputError names a weight that differs.

    Whether all are symmetric is found on the way.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.names: set[str] = set()
        self.first, self.symmetric = "", True
        self.scheme: Scheme | None = None

    def see(self, name: str, record: QTensor) -> None:
        """Take note of a weight."""
        scheme = record.scheme
        self.names.add(name)
        self.symmetric = self.symmetric and record.zero is None
        if self.scheme is None:
            self.first, self.scheme = name, scheme
        elif (scheme.bits, scheme.group_size) != (self.scheme.bits, self.scheme.group_size):
            raise InputError(
                f'"{name}" has {scheme}, "{self.first}" {self.scheme}; {self.what} has one number of bits and one '
                "group size for all: use one in the recipe, or --requantize"
            )

    @property
    def known(self) -> Scheme:
        """The scheme; InputError where nothing was quantized."""
        if self.scheme is None:
            raise InputError(f"nothing in the model is quantized, and {self.what} is for quantized models: quantize it")
        return self.scheme

    def left_out(self, checkpoint: Checkpoint) -> list[str]:
        """The linear layers of the model that stayed floats, by the names of their modules; the head among them."""
        names = Skeleton.of(checkpoint.config, len(checkpoint.tensors)).all_linears
        return sorted(name.removesuffix(".weight") for name in names if name not in self.names)


def refuse_roundings(checkpoint: Checkpoint, what: str) -> None:
    """InputError for a model whose activations or caches are rounded: only compressed-tensors says so."""
    if rounded := [*checkpoint.inputs, *checkpoint.caches]:
        raise InputError(
            f'"{rounded[0]}" rounds what it reads, and {what} stores weights alone; use compressed-tensors, or a '
            "recipe that leaves activations as they are"
        )


def half_scales(record: QTensor) -> Tensor | No:
    """The scales [n, groups] in float16, if that holds them exactly."""
    if isinstance(record.scale, QTensor):
        return No("its scales are quantized too")
    groups = record.scheme.groups(record.columns)
    half = record.scale.half()
    if not torch.equal(half.float(), record.scale.float()):
        return No("its scales are no float16 numbers")
    return half.expand(record.rows, groups).contiguous()


def plain_integers(record: QTensor, bits: tuple[int, ...]) -> bool | No:
    """True for a matrix of `scale * (code - zero)` with groups in its rows, and one of these numbers of bits."""
    if len(record.shape) != 2 or record.axis not in (-1, 1):
        return No("it is not a matrix with groups in its rows")
    if record.codebook is not None or record.scheme.code != "int":
        return No(f"its codes are {record.scheme.code}{record.scheme.bits}, not integers")
    if record.minimum is not None:
        return No("it has minima, which need not be whole zero points")
    if record.boundaries is not None:
        return No("its groups differ in size")
    if record.scheme.bits not in bits:
        return No(f"it has {record.scheme.bits} bits, not {' or '.join(map(str, bits))}")
    return True


def zeros(record: QTensor) -> Tensor:
    """The zero points, uint8 [n, groups]; the middle code where the weight is symmetric."""
    groups = record.scheme.groups(record.columns)
    if record.zero is None:
        return torch.full((record.rows, groups), record.scheme.levels >> 1, dtype=torch.uint8)
    return record.zero.expand(record.rows, groups).contiguous()


def finite(scale: Tensor, name: str, where: Path) -> Tensor:
    """The scales as they are; InputError if one is NaN or infinite."""
    if not bool(torch.isfinite(scale).all()):
        raise InputError(f'"{where}": the tensor "{name}" holds scales that are not finite numbers')
    return scale
