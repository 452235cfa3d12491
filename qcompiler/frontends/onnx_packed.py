"""Writing back the matrices that an ONNX model keeps quantized: the same codes where nothing changed, else floats."""

from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import No, require
from qcompiler.formats.onnx_blocks import Packed, packed_of
from qcompiler.formats.onnx_model import DTYPES, captured, fill, proto_values, stored_name
from qcompiler.frontends.onnx_graph import Builder
from qcompiler.program import Program
from qcompiler.scheme import QTensor


def restore(proto: Any, builder: Builder, program: Program) -> set[str]:
    """Give each quantized matrix of `proto` what the program holds in its place.

    Returns the names of the program's quantized tensors that stand in the model now; others are still to be written.
    Nodes keep their places: what is in the way is left unread, for `tidy`.
    """
    names = {*program.tensors, *program.quantized}
    kept = {n for n, packed in builder.packed.items() if n in names and _restore_packed(proto, n, packed, program)}
    known = [name for name in builder.dequantized if stored_name(name) in names]
    return kept | {stored_name(name) for name in known if _restore_dequantized(proto, name, program)}


def unread(proto: Any) -> set[str]:
    """Values and constants of the main graph that nothing reads."""
    graph = proto.graph
    read = {name for node in graph.node for name in [*node.input, *captured(node)]}
    made = {*(t.name for t in graph.initializer), *(name for node in graph.node for name in node.output)}
    return made - read - {value.name for value in [*graph.input, *graph.output]}


def tidy(proto: Any, before: set[str]) -> None:
    """Drop constants that nothing reads any more, and the nodes that decode them; those of `before` stay."""
    gone = unread(proto) - before
    for node in [n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.output[0] in gone]:
        proto.graph.node.remove(node)
    gone = unread(proto) - before
    for tensor in [t for t in proto.graph.initializer if t.name in gone]:
        proto.graph.initializer.remove(tensor)


def _record(program: Program, name: str) -> QTensor | None:
    """The codes of a tensor of the program, as far as it still is what they decode to."""
    if name in program.quantized:
        return program.qtensor(name)
    record = program.codes.get(name)
    return record if record is not None and torch.equal(record.dequantize(), program.tensors[name]) else None


def _restore_packed(proto: Any, name: str, packed: Packed, program: Program) -> bool:
    """A matrix of MatMulNBits or GatherBlockQuantized: its codes, or floats and a node that reads such."""
    record = _record(program, name)
    if record is None:
        _to_plain(proto, packed, program.tensors[name])
        return False
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    parts = packed.initializers(record)
    if isinstance(parts, No) or any(DTYPES[tensors[n].data_type] != part.dtype for n, part in parts.items()):
        return False
    for part, value in parts.items():
        fill(tensors[part], value)
    return True


def _to_plain(proto: Any, packed: Packed, value: Tensor) -> None:
    """Put Gather, or MatMul and Add, over a float matrix in the place of the node that read the packed one."""
    onnx, graph = require("onnx", "onnx"), proto.graph
    place, node = next((i, node) for i, node in enumerate(graph.node) if packed.codes in node.input)
    inputs, (out,), floats = [*node.input, *([""] * 6)], node.output, f"{packed.codes}.floats"
    if packed.op == "GatherBlockQuantized":
        _add(proto, floats, value)
        made = [onnx.helper.make_node("Gather", [floats, inputs[1]], [out], name=node.name, axis=0)]
    elif bias := inputs[5]:
        _add(proto, floats, value.t())
        made = [onnx.helper.make_node("MatMul", [inputs[0], floats], [f"{out}.product"], name=f"{node.name}.product")]
        made += [onnx.helper.make_node("Add", [f"{out}.product", bias], [out], name=node.name)]
    else:
        _add(proto, floats, value.t())
        made = [onnx.helper.make_node("MatMul", [inputs[0], floats], [out], name=node.name)]
    nodes = [*graph.node[:place], *made, *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)


def _restore_dequantized(proto: Any, name: str, program: Program) -> bool:
    """A matrix that DequantizeLinear decodes: as it is, or floats in the place of what the node gives."""
    key, graph = stored_name(name), proto.graph
    node = next(node for node in graph.node if name in node.output)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    packed = packed_of(node, tensors)
    assert isinstance(packed, Packed)
    before = packed.record(lambda part: proto_values(tensors[part]))
    if key in program.quantized:
        after = program.qtensor(key)
        pairs = zip(after.parts().values(), before.parts().values(), strict=False)
        return after.spec() == before.spec() and all(torch.equal(a, b) for a, b in pairs)
    value = program.tensors[key]
    if not torch.equal(before.dequantize(), value):
        node.output[0] = f"{name}.unread"
        _add(proto, name, value.t() if packed.turned else value)
    return False


def _add(proto: Any, name: str, value: Tensor) -> None:
    """A new initializer."""
    proto.graph.initializer.append(require("onnx", "onnx").numpy_helper.from_array(value.contiguous().numpy(), name))
