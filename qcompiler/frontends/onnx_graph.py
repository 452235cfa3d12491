"""Building a Program from an ONNX graph, node by node: mapped where a rule is right, opaque otherwise."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qcompiler.errors import No, require
from qcompiler.formats.onnx_blocks import Packed, packed_of
from qcompiler.formats.onnx_model import DTYPES, SMALL, Source, captured, proto_values, stored_name
from qcompiler.frontends.onnx_arithmetic import SIZES, Sizes
from qcompiler.frontends.onnx_subgraphs import lifted
from qcompiler.ops import qc
from qcompiler.program import Input, Program, Type

aten = torch.ops.aten
_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


class Builder:
    """A Program under construction from a checked model.

    `types` gives the Type of every value of the main graph.
    """

    def __init__(self, source: Source, types: Mapping[str, Type]) -> None:
        self.proto, self.types = source.proto, dict(types)
        graph = self.proto.graph
        self.opset = next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.stored = dict(source.tensors)
        self.protos = {t.name: t for t in graph.initializer}
        self.types |= {n: Type(tuple(t.shape), t.dtype) for n, t in self.stored.items()}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.small = {n: t.numpy() for n, t in self.stored.items() if t.nbytes <= SMALL}
        self.constants = {n.output[0]: a for n in graph.node if (a := _constant(n)) is not None}
        self.small |= {n: a for n, a in self.constants.items() if a.nbytes <= SMALL}
        self.packed: dict[str, Packed] = {}  # by the program's name of the matrix: MatMulNBits and the like
        self.dequantized: dict[str, Packed] = {}  # by the value that DequantizeLinear gives
        self.program = Program(fx.Graph(), {}, (), ())
        self.turned = self._dequantize(graph)
        self.values: dict[str, fx.Node] = {}
        self.same: dict[Any, fx.Node] = {}  # small constants by what they hold
        self.origin: dict[fx.Node, int] = {}
        self.lifted: set[str] = set()  # tensors that stand in subgraphs
        self.place = ""

    # -- values ----------------------------------------------------------------------------------------------

    def inputs(self, names: Sequence[str]) -> None:
        """Make the placeholders."""
        for name in names:
            node = self.program.graph.placeholder(name)
            node.meta["type"] = self.types[name]
            self.values[name] = node
        self.program.inputs = tuple(Input(name, self.types[name]) for name in names)

    def tensor(self, name: str, value: Tensor) -> fx.Node:
        """A get_attr node of a tensor, stored under its `stored_name`."""
        key = stored_name(name)
        self.program.tensors.setdefault(key, value)
        return self.program.get(key)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A get_attr node of a Constant; small ones that are equal are one."""
        if value.nbytes > SMALL:
            return self.tensor(name, value)
        key = (value.dtype, tuple(value.shape), value.numpy().tobytes())
        if key not in self.same:
            self.same[key] = self.tensor(name, value)
        return self.same[key]

    def value(self, name: str) -> fx.Node:
        """The node that gives the value `name`."""
        if name in self.values:
            return self.values[name]
        stored = self.stored[name]
        if name in self.turned:
            return self.emit(aten.t.default, self.tensor(name, stored.t().contiguous()))
        return self.tensor(name, stored)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call; its type is seen later, when it runs."""
        node = self.program.graph.call_function(target, args, kwargs)
        node.meta = {"type": None, "path": self.place}
        return node

    # -- quantized matrices ----------------------------------------------------------------------------------

    def initializer(self, name: str) -> Tensor:
        """The value of an initializer, one of a type that torch has not as int8 or uint8."""
        if name in self.stored:
            return self.stored[name]
        return proto_values(self.protos[name])

    def matrix(self, found: Packed) -> fx.Node:
        """A get_attr node of a matrix that its one reader keeps packed; the program knows its codes."""
        parts = [self.initializer(name) for name in (found.codes, found.scale, found.zero) if name]
        owner, mark, _ = found.codes.partition("::")  # as the backend onnxruntime names them
        name = owner if mark and owner not in self.packed and owner not in self.stored else f"{found.codes}.matrix"
        name = stored_name(name)
        self.packed[name] = found
        if any(part.is_meta for part in parts):
            return self.tensor(name, torch.empty(found.shape, dtype=parts[1].dtype, device="meta"))
        record = found.record(self.initializer)
        self.program.codes[name] = record
        return self.tensor(name, record.dequantize())

    def _dequantize(self, graph: Any) -> set[str]:
        """Make stored matrices of the constants that DequantizeLinear decodes, and say which matrices are turned."""
        found = {}
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and not isinstance(packed := packed_of(node, self.protos), No):
                found[node.output[0]] = packed
        shapes = {n: p.shape[::-1] if p.turned else p.shape for n, p in found.items()}
        turned = _turned(graph, self.stored | {n: torch.empty(shape, device="meta") for n, shape in shapes.items()})
        for name, packed in found.items():
            if packed.turned != (name in turned):
                turned.discard(name)
                continue
            self.dequantized[name] = packed
            parts = [self.initializer(part) for part in (packed.codes, packed.scale, packed.zero) if part]
            if any(part.is_meta for part in parts):
                self.stored[name] = torch.empty(shapes[name], dtype=parts[1].dtype, device="meta")
                continue
            record = packed.record(self.initializer)
            self.program.codes[stored_name(name)] = record
            values = record.dequantize()
            self.stored[name] = values.t() if packed.turned else values
        return turned

    def finish(self) -> Program:
        """The program, with the graph's outputs."""
        names = [v.name for v in self.proto.graph.output]
        self.program.graph.output(tuple(self.value(name) for name in names))
        self.program.outputs = tuple(names)
        self.program.clean()
        return self.program

    def alive(self) -> set[int]:
        """The indices of the ONNX nodes that the program's outputs need."""
        return {self.origin[node] for node in self.program.graph.nodes if node in self.origin}

    # -- opaque nodes ----------------------------------------------------------------------------------------

    def opaque(self, index: int) -> None:
        """Keep a node as it is: its values come from ONNX Runtime."""
        node, weights = lifted(self.proto.graph.node[index], self.types.keys() | self.constants.keys())
        inner = {name: self.tensor(f"onnx.{index}.{name}", value) for name, value in weights.items()}
        self.types |= {name: Type(tuple(value.shape), value.dtype) for name, value in weights.items()}
        self.lifted.update(str(read.target) for read in inner.values())
        needed = list(dict.fromkeys(n for n in [*node.input, *captured(node)] if n))
        fed = [n for n in needed if n in self.values or n in inner or (n in self.stored and n not in self.small)]
        model = self.single(node, fed, [n for n in needed if n not in fed])
        data = torch.frombuffer(bytearray(model.SerializeToString()), dtype=torch.uint8)
        stored = self.tensor(f"onnx.{index}.{node.op_type}", data)
        values = [inner[n] if n in inner else self.value(n) for n in fed]
        whole = self.emit(qc.onnx, stored, values, op=node.op_type, dtype=torch.float32)
        outputs = [name for name in node.output if name]
        self.origin[whole] = index
        whole.meta["type"] = tuple(self.types[name] for name in outputs)
        for i, name in enumerate(outputs):
            self.values[name] = self.emit(operator.getitem, whole, i)
            self.values[name].meta["type"] = self.types[name]

    def single(self, node: Any, fed: Sequence[str], constants: Sequence[str]) -> Any:
        """A model of one node, with `constants` inside it."""
        onnx = require("onnx", "onnx")
        model = onnx.ModelProto(ir_version=max(self.proto.ir_version, 4))
        model.opset_import.extend(self.proto.opset_import)
        model.functions.extend(self.proto.functions)
        model.graph.name = node.op_type
        model.graph.node.add().CopyFrom(node)
        for name in fed:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, _NUMBERS[self.types[name].dtype], None))
        for name in constants:
            if name in self.protos:
                model.graph.initializer.add().CopyFrom(self.protos[name])
            elif name in self.producers:
                constant = model.graph.node.add()
                constant.CopyFrom(self.producers[name])
        # Constants stand before the node that uses them.
        ordered = [*model.graph.node[1:], model.graph.node[0]]
        del model.graph.node[:]
        model.graph.node.extend(ordered)
        wanted = {name for name in constants if name not in self.protos and name not in self.producers}
        model.graph.sparse_initializer.extend(t for t in self.proto.graph.sparse_initializer if t.values.name in wanted)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
        return model

    # -- sizes -----------------------------------------------------------------------------------------------

    def size(self, name: str, axis: int) -> Any:
        """The length of an axis: an integer, or a node that gives it."""
        length = self.types[name].shape[axis]
        return length if isinstance(length, int) else self.emit(aten.sym_size.int, self.value(name), axis)

    def sizes(self, name: str) -> Sizes | None:
        """The numbers in a small integer tensor: those known now, and nodes for those read from shapes."""
        if name in self.small:
            array = self.small[name]
            return [int(v) for v in array.reshape(-1)] if array.ndim < 2 and array.dtype.kind in "iu" else None
        node = self.producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        reader = SIZES.get(node.op_type)
        return reader(self, Call(self, node)) if reader else None


@dataclass
class Call:
    """One ONNX node, as its rule sees it."""

    builder: Builder
    proto: Any
    attributes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        onnx = require("onnx", "onnx")
        self.attributes = {a.name: a for a in self.proto.attribute}
        self._read = onnx.helper.get_attribute_value

    @property
    def op(self) -> str:
        """The operator's name."""
        return str(self.proto.op_type)

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self.builder.opset

    @property
    def inputs(self) -> list[fx.Node]:
        """All inputs that are there."""
        return [self.builder.value(name) for name in self.proto.input if name]

    def operands(self, swap: bool = False) -> list[Any]:
        """Both inputs, the second as a plain number if it is a constant one; if they may `swap`, the first as well."""
        names = list(self.proto.input)
        if swap and self._number(names[0]) is not None and self._number(names[1]) is None:
            names.reverse()
        number = self._number(names[1])
        inner = self.builder.types.get(names[0])
        small = self.builder.small.get(names[1])
        fits = inner is not None and small is not None and small.ndim <= inner.rank
        return [self.builder.value(names[0]), number if number is not None and fits else self.builder.value(names[1])]

    def _number(self, name: str) -> Any:
        small = self.builder.small.get(name)
        return small.reshape(-1)[0].item() if small is not None and small.size == 1 and small.dtype != bool else None

    def number(self, i: int) -> Any:
        """Input `i` as a plain number if it is a constant one."""
        return self._number(self.name(i)) if self.has(i) else None

    def has(self, i: int) -> bool:
        """Whether input `i` is given."""
        return i < len(self.proto.input) and bool(self.proto.input[i])

    def name(self, i: int) -> str:
        """The name of input `i`."""
        return str(self.proto.input[i])

    def value(self, i: int) -> Any:
        """Input `i`, or None if it is not given."""
        return self.builder.value(self.name(i)) if self.has(i) else None

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute as a Python value; lists of integers are lists, texts are str."""
        if name not in self.attributes:
            return default
        value = self._read(self.attributes[name])
        if isinstance(value, bytes):
            return value.decode()
        return list(value) if isinstance(default, list) or hasattr(value, "__len__") else value

    def tensor_attribute(self, name: str) -> Tensor | None:
        """A tensor attribute, or None."""
        if name not in self.attributes:
            return None
        array = require("onnx", "onnx").numpy_helper.to_array(self.attributes[name].t)
        return torch.from_numpy(np.array(array))

    def constant(self, i: int) -> Any:
        """Input `i` as a numpy array if it is a small constant."""
        return self.builder.small.get(self.name(i)) if self.has(i) else None

    def listed(self, name: str, i: int, since: int) -> list[int] | None:
        """Integers that were an attribute before opset `since` and are a constant input now; None if neither."""
        if self.opset < since:
            return self.attribute(name, None)  # type: ignore[no-any-return]
        found = self.constant(i)
        return None if found is None else [int(v) for v in found.reshape(-1)]

    def dtype(self, i: int) -> torch.dtype:
        """The element type of input `i`."""
        return self.builder.types[self.name(i)].dtype

    def rank(self, i: int) -> int:
        """The number of axes of input `i`."""
        return self.builder.types[self.name(i)].rank

    def shape(self, i: int) -> list[Any] | None:
        """The sizes of input `i`, dynamic ones by name; None if it is not given."""
        return list(self.builder.types[self.name(i)].shape) if self.has(i) else None

    def size(self, i: int, axis: int) -> Any:
        """The length of an axis of input `i`: an integer, or a node that gives it."""
        return self.builder.size(self.name(i), axis)

    def sizes(self, i: int) -> Sizes | None:
        """The numbers in input `i`, as far as they follow from shapes and constants."""
        return self.builder.sizes(self.name(i))

    def is_weight(self, i: int) -> bool:
        """Whether input `i` is a stored float matrix."""
        stored = self.builder.stored.get(self.name(i))
        return stored is not None and stored.dim() == 2 and stored.dtype.is_floating_point

    def weight(self, i: int) -> fx.Node | None:
        """The stored matrix [k, n] of input `i` as a weight [n, k], if every use of it wants it so."""
        name = self.name(i)
        if name not in self.builder.turned:
            return None
        return self.builder.tensor(name, self.builder.stored[name].t().contiguous())

    def width(self, i: int) -> int:
        """The number of output channels of weight `i` of a Gemm."""
        rows, columns = self.builder.stored[self.name(i)].shape
        return rows if self.attribute("transB", 0) else columns

    def matrix(self) -> "fx.Node | No":
        """The quantized matrix that this node reads."""
        found = packed_of(self.proto, self.builder.protos)
        return found if isinstance(found, No) else self.builder.matrix(found)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a PyTorch operator."""
        return self.builder.emit(target, *args, **kwargs)

    def item(self, pieces: fx.Node, i: int) -> fx.Node:
        """The `i`-th of several values."""
        return self.emit(operator.getitem, pieces, i)


def _constant(node: Any) -> Any:
    """The value of a Constant node as a numpy array; None for another node, or a value torch cannot hold."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    helper = require("onnx", "onnx")
    attribute = node.attribute[0]
    if attribute.name == "value" and attribute.t.data_type in DTYPES:
        return helper.numpy_helper.to_array(attribute.t)
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in kinds:
        return None
    return np.array(helper.helper.get_attribute_value(attribute), kinds[attribute.name])


def _turned(graph: Any, stored: Mapping[str, Tensor]) -> set[str]:
    """Matrices that are only ever the right-hand side of products: kept as [n, k], as linear layers want them."""
    wanted: set[str] = set()
    other = {v.name for v in graph.output}
    for node in graph.node:
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        product = node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Gemm") and not transposed
        for i, name in enumerate(node.input):
            (wanted if product and i == 1 else other).add(name)
        other.update(captured(node))
    return {n for n in wanted - other if n in stored and stored[n].dim() == 2 and stored[n].dtype.is_floating_point}
