"""The rule for qc.onnx: nodes of an ONNX model that have no ATen form go back into the graph as they were."""

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.backends.onnxruntime.graph import MICROSOFT, OPSET, subgraphs
from qcompiler.backends.onnxruntime.lowering import Lowering, Rule, Unsupported

_STANDARD = ("", "ai.onnx")
SCAN_WITHOUT_BATCH = 9  # the opset since which Scan means something else; onnx's converter leaves it as it is


def verbatim(
    low: Lowering, out: Any, stored: ir.Value, inputs: Sequence[ir.Value], op: str, *rest: Any
) -> list[ir.Value]:
    """The nodes of a stored model, with subgraphs, custom domains and functions; raised to the graph's opset."""
    assert low.node is not None
    data = low.program.tensors[str(low.node.args[0].target)]  # type: ignore[union-attr]
    proto = raised(onnx.ModelProto.FromString(data.numpy().tobytes()), op)
    model = ir.from_proto(proto)
    # Before IR version 4 initializers are listed as inputs too.
    own_inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    for own, given in zip(own_inputs, inputs, strict=True):
        ir.convenience.replace_all_uses_with(own, given)
        own.name = None
    for domain, version in model.opset_imports.items():
        if domain not in _STANDARD:
            agree(low, domain, version)
    low.graph.functions |= model.functions
    outputs = [_given(value, own_inputs, inputs) for value in model.graph.outputs]
    for value in list(model.graph.initializers.values()):
        ir.convenience.replace_all_uses_with(value, low.graph.adopt(value))
    model.graph.outputs.clear()
    for node in list(model.graph):
        model.graph.remove(node)
        rename(low, node)
        low.graph.nodes.append(node)
    return outputs


def _given(value: ir.Value, own: Sequence[ir.Value], inputs: Sequence[ir.Value]) -> ir.Value:
    """An output that is an input of the stored model is what was given for it."""
    return next((given for mine, given in zip(own, inputs, strict=True) if mine is value), value)


def agree(low: Lowering, domain: str, version: int) -> None:
    """Import a domain; Unsupported if another node wants another version of it."""
    known = low.graph.imports.setdefault(domain, version)
    if known != version and domain != MICROSOFT:
        raise Unsupported(f'version {version} of the domain "{domain}", where another node takes {known}')


def rename(low: Lowering, node: ir.Node) -> None:
    """Give a node and all it makes, in its subgraphs too, names that are free in the graph."""
    node.name = low.graph.unique(node.name or low.label)
    for value in node.outputs:
        value.name = low.graph.unique(value.name) if value.name else value.name
    for graph in subgraphs(node):
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.name = low.graph.unique(str(value.name))
        for inner in graph:
            rename(low, inner)


def raised(proto: onnx.ModelProto, op: str) -> onnx.ModelProto:
    """The model in the operator set that graphs are written in; Unsupported where onnx cannot convert it."""
    version = next((o.version for o in proto.opset_import if o.domain in _STANDARD), OPSET)
    if version == OPSET or all(unchanged(node, version) for node in _nodes(proto.graph)):
        return proto
    if version < SCAN_WITHOUT_BATCH and any(_is_scan(node) for node in _nodes(proto.graph)):
        raise Unsupported(f"Scan of opset {version} goes over batches, which no later one does")
    try:
        made = onnx.version_converter.convert_version(proto, OPSET)
    except Exception as error:  # the converter raises RuntimeErrors of many texts
        reason = str(error).strip().partition("\n")[0][:120]
        raise Unsupported(f"{op} of opset {version} cannot be converted to opset {OPSET}: {reason}") from error
    return made


def _is_scan(node: onnx.NodeProto) -> bool:
    return node.op_type == "Scan" and node.domain in _STANDARD


def unchanged(node: onnx.NodeProto, version: int) -> bool:
    """Whether a node means the same in its opset and in the graph's."""
    if node.domain not in _STANDARD:
        return True
    try:
        then, now = (onnx.defs.get_schema(node.op_type, limit, "").since_version for limit in (version, OPSET))
    except onnx.defs.SchemaError:
        return False
    return bool(then == now)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _nodes(inner)


RULES: dict[str, Rule] = {"qc.onnx": verbatim}
