"""llama.cpp's importance matrices: for each tensor the sum of each input channel's squares, and over how many tokens.

Two file formats: GGUF (tensors `NAME.in_sum2` and `NAME.counts`, `general.type` imatrix), and the older binary one
(.dat: for each entry name, calls, and means times calls; then the number of calls and the data's name).
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler import atomic
from qcompiler.errors import InputError, require
from qcompiler.formats.gguf import GgufFile

SUMS, COUNTS = "in_sum2", "counts"


@dataclass(frozen=True)
class Imatrix:
    """Sums of squares, float32 [channels], and counts of tokens, by GGUF's names of the tensors that read them.

    `datasets` says what was read, in `chunks` pieces of `chunk_size` tokens.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, float]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    means: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        means = {name: total / max(self.counts[name], 1e-30) for name, total in self.sums.items()}
        object.__setattr__(self, "means", means)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Imatrix":
        """Read a file of either format; InputError says in one sentence what is wrong with it."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                found = _from_gguf(path) if file.read(4) == b"GGUF" else _from_dat(path)
        except OSError as error:
            raise InputError(f'cannot read "{path}": {error.strerror}') from None
        for name, total in found.sums.items():
            sound = bool(torch.isfinite(total).all()) and bool((total >= 0).all())
            if not sound or not 0 < found.counts[name] < math.inf:
                raise InputError(f'"{path}": the entry "{name}" holds values that are no sums of squares')
        return found

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file, in the older binary format if its name ends in .dat."""
        with atomic.replacing_file(Path(path)) as fresh:
            _to_dat(self, fresh) if Path(path).suffix == ".dat" else _to_gguf(self, fresh)


def _from_gguf(path: Path) -> Imatrix:
    file = GgufFile.read(path)
    if file.metadata.get("general.type") != "imatrix":
        raise InputError(f'"{path}" is a GGUF file, but not of the type imatrix')
    sums, counts = {}, {}
    for stored in file.tensors.values():
        name, _, kind = stored.name.rpartition(".")
        if kind not in (SUMS, COUNTS) or stored.kind != "F32":
            continue
        values = torch.from_numpy(np.array(file.floats(stored.name))).flatten()
        if kind == SUMS:
            sums[name] = values
        else:
            counts[name] = float(values[0]) if len(values) == 1 else math.nan
    if missing := sorted(set(sums) ^ set(counts)):
        raise InputError(f'"{path}": the entry "{missing[0]}" has not both sums and counts')
    datasets = file.metadata.get("imatrix.datasets", [])
    chunks, size = (file.metadata.get(f"imatrix.chunk_{key}", 0) for key in ("count", "size"))
    if not isinstance(datasets, list) or not isinstance(chunks, int) or not isinstance(size, int):
        raise InputError(f'"{path}": the metadata imatrix.* are not of the types that llama.cpp writes')
    return Imatrix(sums, counts, tuple(map(str, datasets)), chunks, size)


def _to_gguf(matrix: Imatrix, path: Path) -> None:
    gguf = require("gguf", "gguf")
    writer: Any = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    if matrix.datasets:
        writer.add_array("imatrix.datasets", list(matrix.datasets))
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, total in matrix.sums.items():
        writer.add_tensor(f"{name}.{SUMS}", total.float().numpy()[None])
        writer.add_tensor(f"{name}.{COUNTS}", np.array([[matrix.counts[name]]], np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _from_dat(path: Path) -> Imatrix:
    data, at = path.read_bytes(), 0

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise InputError(f'"{path}" is no importance matrix: it ends or lies at byte {at}; get the file again')
        at += size
        return data[at - size : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    sums, counts = {}, {}
    for _ in range(number()):
        try:
            name = take(number()).decode()
        except UnicodeDecodeError:
            raise InputError(f'"{path}" is no importance matrix: a name before byte {at} is not UTF-8') from None
        counts[name] = float(number())
        sums[name] = torch.frombuffer(bytearray(take(4 * number()) or b"\0\0\0\0"), dtype=torch.float32)
    if at == len(data):
        return Imatrix(sums, counts)
    chunks = number()
    dataset = take(number()).decode(errors="replace") if at < len(data) else ""
    return Imatrix(sums, counts, (dataset,) if dataset else (), chunks)


def _to_dat(matrix: Imatrix, path: Path) -> None:
    calls = max(matrix.chunks, 1)
    with path.open("wb") as out:
        out.write(struct.pack("<i", len(matrix.means)))
        for name, mean in matrix.means.items():
            text = name.encode()
            out.write(struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, len(mean)))
            out.write((mean.float() * calls).numpy().astype("<f4").tobytes())
        dataset = " ".join(matrix.datasets).encode()
        out.write(struct.pack("<ii", calls, len(dataset)) + dataset)
