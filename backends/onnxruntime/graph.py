"""An ONNX graph under construction, and the two files it becomes: model.onnx and model.onnx.data."""

import collections
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.backends.onnxruntime.names import DATA, METADATA, MODEL
from qcompiler.program import Type

OPSET = 23
IR_VERSION = 10
MICROSOFT = "com.microsoft"
INLINE = 1 << 30  # bytes of tensors that go into the model file; protobuf ends at 2 GB
PAGE = 4096  # large tensors start on a page, so that ONNX Runtime can map them instead of copying

ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
TORCH_DTYPES = {theirs: ours for ours, theirs in ONNX_DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor to be written, made when it is written: one at a time is in memory.

    Two tensors with the same `key` have the same bytes, perhaps in another shape, and are written once. One that is
    `given` becomes an input of the graph: who runs it finds the place of its bytes in the metadata, "given".
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    key: str
    kind: ir.DataType | None = None  # of elements that torch does not have; `make` gives their bytes, uint8
    given: bool = False

    @property
    def element(self) -> ir.DataType:
        """The type of the elements."""
        return self.kind or ONNX_DTYPES[self.dtype]


@dataclass
class Graph:
    """ONNX nodes in order and the tensors they read."""

    nodes: list[ir.Node] = field(default_factory=list)
    constants: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)
    stored: dict[str, tuple[ir.Value, Stored]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    defaults: list[ir.Value] = field(default_factory=list)
    imports: dict[str, int] = field(default_factory=dict)  # versions of domains that nodes came with
    functions: dict[Any, ir.Function] = field(default_factory=dict)

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", name: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output and return that; attributes that are None are left out."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        outputs: int,
        unused: Sequence[int] = (),
        domain: str = "",
        name: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with several outputs and return them; it is told not to make the `unused` ones."""
        names = [f"{name or kind}.{i}" if i else name or kind for i in range(outputs)]
        values = [ir.Value(name="" if i in unused else self.unique(names[i])) for i in range(outputs)]
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        shown = {key: value for key, value in attributes.items() if value is not None}
        label = self.unique(f"{values[0].name}/{kind}")
        self.nodes.append(ir.node(kind, given, shown, domain=domain, outputs=values, name=label))
        return values

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A small tensor, written into the model file; equal ones are one."""
        tensor = torch.as_tensor(value, dtype=dtype)
        key = (tensor.numpy().tobytes(), tensor.dtype, tensor.shape)
        if key not in self.constants:
            name = self.unique("constant")
            data = ir.tensor(tensor.numpy().copy(), name=name)
            self.constants[key] = typed(ir.val(name, const_value=data), Type(tuple(tensor.shape), tensor.dtype))
        return self.constants[key]

    def store(self, name: str, tensor: Stored) -> ir.Value:
        """A large tensor, written into the data file; asked for twice it is the same value."""
        if name not in self.stored:
            value = typed(ir.Value(name=self.unique(name)), Type(tensor.shape, tensor.dtype))
            value.type = ir.TensorType(tensor.element)
            self.stored[name] = (value, tensor)
        return self.stored[name][0]

    def adopt(self, value: ir.Value) -> ir.Value:
        """The same as an initializer of another graph, written into the model file."""
        name = self.unique(str(value.name))
        self.constants["adopted", name] = ir.val(name, const_value=value.const_value)
        return self.constants["adopted", name]

    def input(self, name: str, kind: Type, default: Tensor | None = None) -> ir.Value:
        """A graph input; one with a default may be left out."""
        value = typed(ir.Value(name=self.unique(name)), kind)
        if default is not None:
            value.const_value = ir.tensor(default.numpy().copy(), name=name)
            self.defaults.append(value)
        return value

    def unique(self, name: str) -> str:
        """`name`, with a number where it is taken."""
        found, i = name, 1
        while found in self.names:
            found, i = f"{name}.{i}", i + 1
        self.names.add(found)
        return found

    def save(
        self,
        folder: Path,
        inputs: Sequence[ir.Value],
        outputs: Mapping[str, ir.Value],
        about: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
        inline: bool = False,
        model: str = MODEL,
    ) -> None:
        """Write to `folder` what the outputs depend on, as `model` and a file of its data; unread inputs are left out.

        `about` is JSON-able and is kept in the model's metadata, with the number of nodes of each kind, beside
        `metadata` of the source. With `inline` there is one file, where its format allows it (up to 2 GB).
        """
        ends = [self._end(name, value) for name, value in outputs.items()]
        nodes = needed(self.nodes, ends)
        used = {value for node in nodes for value in read_by(node)}
        initializers = [value for value in (*self.constants.values(), *self.defaults) if value in used]
        pairs = [pair for pair in self.stored.values() if pair[0] in used]
        write_tensors(pairs, folder, f"{model}{DATA}")
        given = {str(value.name): separate(value) for value, stored in pairs if stored.given}
        initializers += [value for value, stored in pairs if not stored.given]
        graph = ir.Graph(
            [value for value in (*inputs, *(value for value, stored in pairs if stored.given)) if value in used],
            ends,
            nodes=nodes,
            initializers=initializers,
            opset_imports={**self.imports, **needed_domains(nodes), "": OPSET},
            name="program",
        )
        counts = collections.Counter(node.op_type for node in nodes)
        note = json.dumps({"nodes": dict(counts.most_common()), **about, "given": given})
        made = ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="qcompiler",
            metadata_props={**(metadata or {}), METADATA: note},
            functions=list(self.functions.values()),
        )
        file, data = folder / model, folder / f"{model}{DATA}"
        ir.save(made, file)
        if inline and data.stat().st_size < INLINE:
            onnx.save(onnx.load(file), file)
            data.unlink()

    def _end(self, name: str, value: ir.Value) -> ir.Value:
        """The graph output called `name`, in the shape it has with every input's default.

        onnxruntime-genai makes room by it; who gives such an input gets what that asks for.
        """
        end = self.op("Identity", value, name=name) if value.producer() is None or value.is_graph_output() else value
        end.name = name
        usual = {s: n for d in self.defaults for s, n in zip(sizes_of(d), d.const_value.shape, strict=True)}  # type: ignore[union-attr]
        end.type, end.shape = value.type, ir.Shape([usual.get(size, size) for size in sizes_of(value)])
        return end


def needed(nodes: Sequence[ir.Node], outputs: Iterable[ir.Value]) -> list[ir.Node]:
    """Those of `nodes` that `outputs` depend on, in order."""
    found = {value.producer() for value in outputs}
    for node in reversed(nodes):
        if node in found:
            found |= {value.producer() for value in read_by(node)}
    return [node for node in nodes if node in found]


def needed_domains(nodes: Iterable[ir.Node]) -> dict[str, int]:
    """ONNX Runtime's own operators, if there are any."""
    return {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in nodes) else {}


def read_by(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads: its inputs, and whatever its subgraphs read or give."""
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
        yield from graph.outputs
        for inner in graph:
            yield from read_by(inner)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def write_tensors(pairs: Iterable[tuple[ir.Value, Stored]], folder: Path, data: str) -> None:
    """Write tensors to the file `data`, one at a time, and point their values at it."""
    places: dict[str, tuple[int, int]] = {}
    with (folder / data).open("wb") as file:
        for value, stored in pairs:
            if stored.key not in places:
                raw = np.ascontiguousarray(stored.make().detach().numpy())
                unit = PAGE if raw.nbytes >= PAGE else 64
                file.seek(-(-file.tell() // unit) * unit)
                places[stored.key] = (file.tell(), raw.nbytes)
                file.write(raw.data)
            offset, length = places[stored.key]
            value.const_value = ir.ExternalTensor(
                data,
                offset,
                length,
                stored.element,
                shape=ir.Shape(stored.shape),
                name=str(value.name),
                base_dir=folder,
            )


def separate(value: ir.Value) -> int:
    """Where a value's bytes begin in the data file; the value itself no longer knows."""
    assert isinstance(value.const_value, ir.ExternalTensor)
    offset, value.const_value = value.const_value.offset, None
    return int(offset or 0)


def typed(value: ir.Value, kind: Type) -> ir.Value:
    """The same value, with type and shape set."""
    value.type = ir.TensorType(ONNX_DTYPES[kind.dtype])
    value.shape = ir.Shape(kind.shape)
    return value


def dtype_of(value: ir.Value) -> torch.dtype:
    """The dtype of a typed value."""
    assert value.dtype is not None
    return TORCH_DTYPES[value.dtype]


def sizes_of(value: ir.Value) -> tuple[int | str, ...]:
    """The sizes of a typed value; dynamic ones are names."""
    assert value.shape is not None
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
