"""GGUF: a checked reader of the file's header, and the QTensor of a stored block tensor.

A file is measured before it is believed: every count, length, type and offset is checked against the bytes that
are there, so that a truncated or hostile file costs one clear sentence and no memory.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompiler.errors import InputError, No, require
from qcompiler.formats import gguf_types
from qcompiler.scheme import QTensor

# Value types of the metadata, by number: uint8, int8, ... as struct spells them. 8 is text, 9 an array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: its shape (outermost axis first), its type's name, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The checked header of a GGUF file, and access to its tensors.

    `metadata` holds the key-value pairs as Python values; `spans` says where each lies in the file, `types` the numbers
    of its type and (of an array) of its items' type.
    """

    path: Path
    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: dict[str, Stored]
    types: dict[str, tuple[int, int | None]]

    @classmethod
    def read(cls, path: Path) -> "GgufFile":
        """Read and check the header; InputError says in one sentence what is wrong with the file."""
        try:
            with path.open("rb") as file:
                if path.stat().st_size < 24:
                    raise _Broken("it is shorter than a GGUF header")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return cls(path, *_parse(data))
        except OSError as error:
            raise InputError(f'cannot read "{path}": {error.strerror}') from None
        except _Broken as error:
            raise InputError(f'"{path}" is not a usable GGUF file: {error}; get the file again') from None

    @property
    def architecture(self) -> str:
        """The value of general.architecture; InputError if there is none."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise InputError(f'"{self.path}" does not name its architecture (general.architecture)')
        return value

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes of a tensor, uint8 [nbytes], mapped from the file."""
        stored = self.tensors[name]
        return np.memmap(self.path, np.uint8, "r", stored.start, (stored.nbytes,))

    def floats(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor decoded to float32, in its shape; InputError for a type that gguf-py cannot decode."""
        gguf = require("gguf", "gguf")
        stored = self.tensors[name]
        kind = gguf.GGMLQuantizationType[stored.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = self.raw(name).reshape(*stored.shape[:-1], stored.shape[-1] // block * size)
        if stored.kind in ("F32", "F16"):
            rows = rows.view(np.float32 if stored.kind == "F32" else np.float16)
        try:
            decoded: np.ndarray[Any, np.dtype[np.float32]] = gguf.dequantize(rows, kind)
        except NotImplementedError:
            raise InputError(
                f'tensor "{name}" of "{self.path}" has type {stored.kind}, which nothing decodes'
            ) from None
        return decoded

    def qtensor(self, name: str) -> QTensor | No:
        """The tensor as its stored codes, if its type is one that a QTensor holds exactly."""
        stored = self.tensors[name]
        if stored.kind not in gguf_types.KINDS:
            return No(f"type {stored.kind} is read as floats", where=name)
        if len(stored.shape) != 2:
            return No(f"{len(stored.shape)} axes; only matrices keep their codes", where=name)
        return gguf_types.decode(stored.kind, torch.from_numpy(np.array(self.raw(name))), stored.shape)


class _Broken(Exception):
    """What is wrong with the file, as the middle of a sentence."""


@dataclass
class _Cursor:
    """A position in the header; every read is checked against the end of the file."""

    data: mmap.mmap
    at: int = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _Broken(f"it ends inside the header (at byte {len(self.data)}; {size} more were announced)")
        start, self.at = self.at, self.at + size
        return self.data[start : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def peek(self, code: str) -> int:
        """The number here, without going on."""
        at, value = self.at, int(self.number(code))
        self.at = at
        return value

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise _Broken(f"a text before byte {self.at} of the header is not UTF-8") from None

    def count(self, what: str, smallest: int) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count = int(self.number("Q"))
        if count * smallest > len(self.data) - self.at:
            raise _Broken(f"it announces {count} {what}, more than its {len(self.data)} bytes can hold")
        return count

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY or depth > 3:
            raise _Broken(f"a metadata value before byte {self.at} has the unknown type {kind}")
        inner = self.number("I")
        code = _SCALARS.get(inner)
        if code is None:
            return [self.value(inner, depth + 1) for _ in range(self.count("array items", 8))]
        size = struct.calcsize("<" + code)
        count = self.count("array items", size)
        return list(struct.unpack(f"<{count}{code}", self.take(count * size)))


Parsed = tuple[dict[str, Any], dict[str, tuple[int, int]], dict[str, Stored], dict[str, tuple[int, int | None]]]


def _parse(data: mmap.mmap) -> Parsed:
    """The metadata, their places, the tensors, and the metadata's types; _Broken says what is wrong."""
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise _Broken("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise _Broken(f"its version is {version}, not 2 or 3 in little-endian order")
    tensor_count, pair_count = cursor.count("tensors", 24), cursor.count("metadata pairs", 13)
    metadata, spans, types = {}, {}, {}
    for _ in range(pair_count):
        start, key = cursor.at, cursor.text()
        if key in metadata:
            raise _Broken(f'the metadata key "{key}" appears twice')
        kind = cursor.number("I")
        types[key] = (kind, cursor.peek("I") if kind == _ARRAY else None)
        metadata[key] = cursor.value(kind)
        spans[key] = (start, cursor.at)
    announced = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Broken(f"its alignment {alignment!r} is not a power of two")
    return metadata, spans, _placed(announced, -(-cursor.at // alignment) * alignment, alignment, len(data)), types


def _tensor(cursor: _Cursor) -> Stored:
    """One entry of the tensor table; `start` is still relative to the data section."""
    gguf = require("gguf", "gguf")
    name, rank = cursor.text(), cursor.number("I")
    if not 1 <= rank <= 4:
        raise _Broken(f'tensor "{name}" has {rank} axes, not 1 to 4')
    shape = tuple(int(cursor.number("Q")) for _ in range(rank))[::-1]
    number, start = cursor.number("I"), cursor.number("Q")
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise _Broken(f'tensor "{name}" has the unknown type {number}') from None
    if 0 in shape or shape[-1] % block:
        raise _Broken(f'tensor "{name}" has shape {list(shape)}, which type {kind.name} cannot hold')
    count = 1
    for axis in shape:
        count *= axis
    return Stored(name, shape, kind.name, start, count // block * size)


def _placed(announced: list[Stored], base: int, alignment: int, size: int) -> dict[str, Stored]:
    """The tensors by name with absolute places, checked to lie in the file, aligned, apart from each other."""
    tensors: dict[str, Stored] = {}
    end, before = 0, ""
    for t in sorted(announced, key=lambda t: t.start):
        if t.name in tensors:
            raise _Broken(f'the tensor name "{t.name}" appears twice')
        if base + t.start + t.nbytes > size:
            raise _Broken(f'tensor "{t.name}" ends at byte {base + t.start + t.nbytes}, the file at byte {size}')
        if t.start % alignment:
            raise _Broken(f'tensor "{t.name}" starts at {t.start}, which is not a multiple of {alignment}')
        if t.start < end:
            raise _Broken(f'tensors "{before}" and "{t.name}" overlap')
        end, before = t.start + t.nbytes, t.name
        tensors[t.name] = Stored(t.name, t.shape, t.kind, base + t.start, t.nbytes)
    return {t.name: tensors[t.name] for t in announced}
