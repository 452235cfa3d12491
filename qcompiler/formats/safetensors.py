"""Safetensors shards: written one tensor at a time, read memory-mapped.

The safetensors package refuses tensors that share memory, copies what it writes, and aligns to 8 bytes. Matrix
products give other last bits on weights that are not aligned as PyTorch aligns them (64 bytes), so here tensors are
aligned: a program computes the same bits before it is saved and after it is loaded.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompiler.errors import InputError

ALIGNMENT = 64

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = 2 * 10**9) -> list[str]:
    """Write tensors of any shape, layout in memory and device; returns the names of the files, in order.

    A file holds at most `shard_bytes` of data, or one tensor that is larger. Raises InputError for a tensor the format
    cannot hold, OSError where the file system refuses.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise InputError(f'tensor "{name}" ({kind}) cannot be saved; make it a dense tensor of a common dtype')
    shards = list(_split(tensors, shard_bytes))
    files = []
    for i, names in enumerate(shards, start=1):
        number = "" if len(shards) == 1 else f"-{i:05d}-of-{len(shards):05d}"
        files.append(f"model{number}.safetensors")
        _write_one(folder / files[-1], {name: tensors[name] for name in sorted(names, key=_rank(tensors))})
    return files


def read(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files, by name, memory-mapped; InputError names a file that is damaged."""
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f'"{path}" is not a complete safetensors file ({error}); copy it again') from error
    return found


def same_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one of the same memory, shape and dtype, each with the name of that one.

    >>> a = torch.zeros(2)
    >>> same_memory({"a": a, "b": torch.zeros(2), "c": a.view(2)})
    {'c': 'a'}
    """
    first: dict[Any, str] = {}
    found = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
            continue
        where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if first.setdefault(where, name) != name:
            found[name] = first[where]
    return found


def _split(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """The names in runs of at most `limit` bytes; at least one run."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _rank(tensors: Mapping[str, Tensor]) -> Any:
    """Sort key: sizes that keep what follows aligned come first, for the format allows no gaps."""

    def rank(name: str) -> tuple[int, str]:
        size = tensors[name].nbytes
        return -min(size & -size, ALIGNMENT) if size else -ALIGNMENT, name

    return rank


def _write_one(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        kind, shape = DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
            flat = flat.as_strided(flat.shape, (1,))  # one element may have any stride
            file.write(flat.view(torch.uint8).numpy().data)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
