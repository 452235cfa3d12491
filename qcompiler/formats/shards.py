"""A checkpoint's safetensors files, one tensor at a time: read when asked for, written as they come.

The safetensors package checks a file's header against its bytes (lengths, gaps, overlaps); here the index beside
several files is checked too. Writing needs the memory of one tensor: its bytes go to disk at once, and the header is
put before them when a file is full.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.formats.safetensors import DTYPES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
JSON_LIMIT = 64 * 2**20  # bytes of a configuration or an index that are believed
_SIZES = (8, 4, 2, 1)  # of an element: the largest first, so that every tensor lies aligned in its file


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError says in one sentence why there is none."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise InputError(f'"{path}" has {path.stat().st_size} bytes, too many for a file that describes a model')
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f'cannot read "{path}": {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise InputError(f'"{path}" is not JSON: {str(error)[:100]}') from None
    if not isinstance(found, dict):
        raise InputError(f'"{path}" holds a {type(found).__name__}, not an object with names')
    return found


class Shards:
    """The tensors of a folder's safetensors files by name, mapped, and read when asked for.

    Raises InputError for files that are missing, incomplete or outside the folder, and for a name in two of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        for name in _file_names(folder):
            path = folder / name
            try:
                file = safe_open(path, framework="pt")
                held: list[str] = list(file.keys())  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
                raise InputError(
                    f'"{path}" is not a complete safetensors file ({_short(error)}); copy it again'
                ) from None
            for tensor in held:
                if tensor in self._files:
                    raise InputError(f'"{folder}": the tensor "{tensor}" stands in two files; remove what is stale')
                self._files[tensor] = file
        if not self._files:
            raise InputError(f'"{folder}" holds no tensors')

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as the format spells it, such as `I32`, from the header alone."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise InputError(f'"{self.folder}" lacks the tensor "{name}"; copy the folder again')
        return self._files[name].get_slice(name)

    def get(self, name: str) -> Tensor:
        """A tensor, mapped; InputError if it is not there."""
        self._slice(name)
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise InputError(f'"{self.folder}": the tensor "{name}" cannot be read ({_short(error)})') from None
        return tensor


def _file_names(folder: Path) -> list[str]:
    """The safetensors files that belong to the checkpoint: those of the index, or the one of the usual name, or all."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE]
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if not found:
            raise InputError(f'"{folder}" holds no .safetensors file; other kinds of weights are not read')
        return found
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f'"{folder / INDEX}" has no weight_map of tensors to files')
    names = sorted({name if isinstance(name, str) else repr(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f'"{folder / INDEX}" names the file "{name[:80]}", which is no .safetensors file beside it'
            )
        if not (folder / name).is_file():
            raise InputError(f'"{folder / INDEX}" names the file "{name}", which is missing; copy the folder again')
    return names


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


class ShardWriter:
    """Writes tensors into `model*.safetensors` of at most `shard_bytes` each, and the index where there are several.

    Use it as a context manager; the files have their names when the block ends well.
    """

    def __init__(self, folder: Path, shard_bytes: int = 2 * 10**9) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._open: _Bodies | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
            self._finish()
        elif self._open:
            self._open.discard()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; InputError if the name was used or the format has no such dtype."""
        if name in self._names:
            raise InputError(f'two tensors are called "{name}"; a checkpoint needs a name for each')
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(f'tensor "{name}" ({tensor.dtype}, {tensor.layout}) cannot be stored in safetensors')
        if self._open and self._open.nbytes + tensor.nbytes > self.shard_bytes:
            self._close()
        if self._open is None:
            self._open = _Bodies(self.folder)
            self._shards.append([])
        self._open.add(name, tensor)
        self._names.add(name)
        self._shards[-1].append(name)
        self.bytes += tensor.nbytes

    def _close(self) -> None:
        if self._open:
            self._open.finish(self.folder / f".shard-{len(self._shards)}")
            self._open = None

    def _finish(self) -> None:
        count = len(self._shards)
        places: dict[str, str] = {}
        for i, held in enumerate(self._shards, start=1):
            name = SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            (self.folder / f".shard-{i}").rename(self.folder / name)
            places |= dict.fromkeys(held, name)
        if count > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(places.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class _Bodies:
    """The bytes of one file to be: a body for each size of element, and where each tensor lies in its body."""

    def __init__(self, folder: Path) -> None:
        self._paths = {size: folder / f".body-{size}" for size in _SIZES}
        self._files: dict[int, IO[bytes]] = {}
        self._lengths = dict.fromkeys(_SIZES, 0)
        self._held: list[tuple[str, Tensor, int]] = []

    @property
    def nbytes(self) -> int:
        return sum(self._lengths.values())

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.element_size()
        if size not in self._files:
            self._files[size] = self._paths[size].open("wb")
        flat = tensor.detach().cpu().contiguous().view(-1)
        self._files[size].write(flat.view(torch.uint8).numpy().data)
        self._held.append((name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), self._lengths[size]))
        self._lengths[size] += tensor.nbytes

    def finish(self, path: Path) -> None:
        starts, total = {}, 0
        for size in _SIZES:
            starts[size] = total
            total += self._lengths[size]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, like, place in self._held:
            start = starts[like.element_size()] + place
            offsets = [start, start + like.nbytes]
            header[name] = {"dtype": DTYPES[like.dtype], "shape": list(like.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for size, file in sorted(self._files.items(), reverse=True):
                file.close()
                with self._paths[size].open("rb") as body:
                    shutil.copyfileobj(body, out, 2**20)
        self.discard()

    def discard(self) -> None:
        for size, file in self._files.items():
            file.close()
            with contextlib.suppress(FileNotFoundError):
                self._paths[size].unlink()
