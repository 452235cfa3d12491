"""Reading ONNX files with suspicion: every tensor is measured, every name resolved, before anything is run."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import InputError, require

# Element types by their number in TensorProto; those that torch cannot hold are absent.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
}
_STRING, _EXTERNAL = 8, 1
SMALL = 1024  # bytes; larger constants are stored beside the graph and never looked into


@dataclass(frozen=True)
class Source:
    """A checked model: its ModelProto, and the initializers that torch can hold, by name.

    Large initializers have lost their data in `proto` (dims and type stay); `tensors` has them, mapped from an
    external file where they lie in one.
    """

    proto: Any
    tensors: dict[str, Tensor]
    name: str = "the model"

    def complete(self) -> Any:
        """A copy of the ModelProto with the data back in it, and nothing external."""
        return filled(self.proto, self.tensors)


def read(source: Any) -> Source:
    """Read a path, a ModelProto or an onnx_ir model; InputError says in one sentence what is wrong with it."""
    onnx = require("onnx", "onnx")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _checked(_parse(path), path.parent, f'"{path}"')
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        return _checked(proto, None, "the model")
    return _checked(require("onnx_ir", "onnx").to_proto(source), None, "the model")


def _parse(path: Path) -> Any:
    """The ModelProto of a file, external data not loaded."""
    onnx = require("onnx", "onnx")
    message = require("google.protobuf.message", "onnx")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise InputError(f'cannot read "{path}": {error.strerror}') from None
    except message.DecodeError:
        raise InputError(f'"{path}" is not an ONNX file, or is cut short; get the file again') from None
    return proto


def _checked(proto: Any, folder: Path | None, name: str) -> Source:
    try:
        if not proto.opset_import or not proto.graph.output:
            raise _Broken("it has no opset or no graph with outputs")
        check_names(proto.graph, set())
        tensors = {}
        for tensor in proto.graph.initializer:
            value = _take(tensor, folder)
            if value is not None:
                tensors[tensor.name] = value
        for inner in _attribute_tensors(proto):
            _take(inner, folder, inline=True)
    except _Broken as error:
        raise InputError(f"{name} is not a usable ONNX model: {error}") from None
    return Source(proto, tensors, name)


class _Broken(Exception):
    """What is wrong with the model, as the middle of a sentence."""


def check_names(graph: Any, outer: set[str]) -> None:
    """Every value must be produced before it is used, once; raises an error that names the first that is not."""
    known = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    known |= {t.values.name for t in graph.sparse_initializer}
    if not all(isinstance(name, str) for name in known):
        raise _Broken("a name in it is not UTF-8")
    for node in graph.node:
        if not all(isinstance(text, str) for text in (node.op_type, node.name, *node.input, *node.output)):
            raise _Broken("a name in it is not UTF-8")
        for name in node.input:
            if name and name not in known and name not in outer:
                what = node.name or node.op_type
                raise _Broken(f'node "{what}" uses "{name}" before anything produces it (a cycle, or a missing node)')
        for inner in subgraphs(node):
            check_names(inner, known | outer)
        for name in node.output:
            if name and name in known:
                raise _Broken(f'"{name}" is produced twice')
            known.add(name)
    for value in graph.output:
        if value.name not in known and value.name not in outer:
            raise _Broken(f'nothing produces its output "{value.name}"')


def subgraphs(node: Any) -> Iterator[Any]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def captured(node: Any) -> list[str]:
    """The outer values that a node's subgraphs use, in order of appearance."""
    found: dict[str, None] = {}
    for graph in subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        for inner in graph.node:
            for name in [*inner.input, *captured(inner)]:
                if name and name not in own:
                    found[name] = None
            own.update(inner.output)
        found.update(dict.fromkeys(v.name for v in graph.output if v.name not in own))
    return list(found)


def _attribute_tensors(proto: Any) -> Iterator[Any]:
    """Every tensor that is not an initializer of the main graph."""

    def walk(nodes: Any) -> Iterator[Any]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
            for graph in subgraphs(node):
                yield from graph.initializer
                yield from walk(graph.node)

    yield from walk(proto.graph.node)
    for function in proto.functions:
        yield from walk(function.node)


def _take(tensor: Any, folder: Path | None, inline: bool = False) -> Tensor | None:
    """The value of a tensor as torch holds it; a large or external one loses its data in the proto.

    `inline` loads external data into the proto instead.
    """
    onnx = require("onnx", "onnx")
    size = _size(tensor)
    dtype = DTYPES.get(tensor.data_type)
    if tensor.data_location == _EXTERNAL:
        data = _external(tensor, folder, size)
        if inline or dtype is None:
            tensor.raw_data = data.tobytes()
        _forget_external(tensor)
        if inline or dtype is None:
            return None
        if size <= SMALL:
            tensor.raw_data = data.tobytes()
        return torch.from_numpy(data).view(dtype).view(tuple(tensor.dims))
    if tensor.data_type == _STRING or dtype is None or inline:
        return None
    value = torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))
    if size > SMALL:
        strip(tensor)
    return value


def _size(tensor: Any) -> int:
    """Bytes of a tensor, checked against the data that are there."""
    onnx = require("onnx", "onnx")
    count = 1
    for axis in tensor.dims:
        if axis < 0:
            raise _Broken(f'tensor "{tensor.name}" has shape {list(tensor.dims)}')
        count *= axis
    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise _Broken(f'tensor "{tensor.name}" has the unknown element type {tensor.data_type}') from None
    dense = tensor.data_type in DTYPES
    if tensor.data_location != _EXTERNAL and dense:
        fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        held = len(tensor.raw_data) // width if tensor.raw_data else sum(len(getattr(tensor, f)) for f in fields)
        if held != count or len(tensor.raw_data) % width:
            raise _Broken(f'tensor "{tensor.name}" of shape {list(tensor.dims)} holds {held} numbers, not {count}')
    return int(count * width)


def _external(tensor: Any, folder: Path | None, size: int) -> np.ndarray[Any, Any]:
    """The external bytes of a tensor, mapped; never from outside the model's folder."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = where.get("location", "")
    if not isinstance(location, str) or "\0" in location:  # what is no UTF-8 comes as bytes
        raise _Broken(f'tensor "{tensor.name}" lies in an external file that no file can be called')
    if folder is None:
        raise _Broken(f'tensor "{tensor.name}" lies in the external file "{location}"; give the path of the model')
    base = folder.resolve()
    path = (base / location).resolve()
    if not location or Path(location).is_absolute() or not path.is_relative_to(base):
        raise _Broken(f'tensor "{tensor.name}" points outside the model\'s folder ("{location}")')
    if not path.is_file():
        raise _Broken(f'its external data file "{location}" is missing')
    try:
        start, length = int(where.get("offset", 0)), int(where.get("length", size))
    except ValueError:
        raise _Broken(f'tensor "{tensor.name}" has a place that is not a number') from None
    if start < 0 or start + length > path.stat().st_size or (tensor.data_type in DTYPES and length != size):
        raise _Broken(f'tensor "{tensor.name}" of {size} bytes is not in "{location}" ({length} bytes from {start})')
    if not length:
        return np.zeros(0, np.uint8)
    # Mapped copy-on-write: torch wants memory that it may write to.
    return np.memmap(path, np.uint8, "c", start, (length,))


def _forget_external(tensor: Any) -> None:
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def strip(tensor: Any) -> None:
    """Drop a tensor's data; name, dims and type stay."""
    for data in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(data)


def fill(tensor: Any, value: Tensor) -> None:
    """Give a TensorProto the data of `value`, whose shape and dtype it has."""
    strip(tensor)
    tensor.raw_data = value.numpy().tobytes()


def filled(proto: Any, tensors: dict[str, Tensor]) -> Any:
    """A copy of `proto` whose stripped initializers have the data of `tensors`."""
    copy = require("onnx", "onnx").ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name in tensors and not _holds_data(tensor):
            fill(tensor, tensors[tensor.name])
    return copy


def proto_values(tensor: Any) -> Tensor:
    """The values of a TensorProto; codes of 4 bits and fewer as int8 or uint8."""
    array = require("onnx", "onnx").numpy_helper.to_array(tensor)
    if tensor.data_type not in DTYPES:
        array = array.astype(np.int8 if tensor.data_type in (22, 26) else np.uint8)
    return torch.from_numpy(np.array(array))


def stored_name(name: str) -> str:
    """The name of an initializer in a program, where `::` stands for the parts of a quantized tensor."""
    return name.replace("::", "..")


def _holds_data(tensor: Any) -> bool:
    return any(
        len(getattr(tensor, f))
        for f in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    )
