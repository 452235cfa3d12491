"""Writing a captured ONNX model back: nodes and names verbatim, tensors as the program has them now.

The original graph is built again from what `info["onnx"]` keeps; where the program still has the same calls, the
original nodes are written. A linear layer whose weight was quantized becomes `MatMulNBits`; a matrix that was quantized
in the original stays as it was, or becomes floats where a pass changed it. Any other change is refused, since no one
asked for another graph.
"""

import base64
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qcompiler.bits import pack_bits
from qcompiler.errors import BackendError, InputError, No, require
from qcompiler.formats.onnx_model import DTYPES, Source, fill, stored_name
from qcompiler.frontends.onnx import build
from qcompiler.frontends.onnx_graph import Builder
from qcompiler.frontends.onnx_packed import restore, tidy, unread
from qcompiler.ops import qc
from qcompiler.program import Program, Type
from qcompiler.scheme import QTensor

aten = torch.ops.aten
QUANTIZED = ((aten.linear.default, qc.linear), (aten.embedding.default, qc.embedding))
_INLINE = 1 << 30  # bytes; protobuf ends at 2 GB, larger models get an external data file


def write(program: Program, path: str | os.PathLike[str]) -> None:
    """Write the program as an ONNX file, with its tensors in `<file>.data` if they are larger than 1 GB.

    Raises InputError for a program that did not come from ONNX, BackendError for one that passes changed in a way
    that its original graph cannot express.
    """
    proto = export(program)
    onnx, target = require("onnx", "onnx"), Path(path)
    large = sum(len(t.raw_data) for t in proto.graph.initializer) > _INLINE
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".qcompiler-") as folder:
            made, data = Path(folder, target.name), f"{target.name}.data"
            onnx.save_model(proto, made, save_as_external_data=large, location=data)
            for file in sorted(Path(folder).iterdir(), key=lambda f: f == made):  # the model last: it makes it whole
                file.replace(target.parent / file.name)
    except OSError as error:
        raise InputError(f'cannot write "{target}": {error.strerror}') from None


def export(program: Program) -> Any:
    """The program as a ModelProto; raises what `write` raises."""
    onnx = require("onnx", "onnx")
    kept: Mapping[str, Any] | None = program.info.get("onnx")
    if kept is None:
        raise InputError("this program was not captured from an ONNX model, so there is no graph to write back")
    if "whole" in kept:
        return onnx.ModelProto.FromString(program.tensors["onnx.model"].numpy().tobytes())
    proto = onnx.ModelProto.FromString(base64.b64decode(kept["model"]))
    builder = _again(program, proto, kept)
    quantized = _matched(program, builder)
    for name in builder.lifted:
        if not torch.equal(program.tensors[name], builder.program.tensors[name]):
            raise _changed(f'tensor "{name}" of a subgraph has other values')
    for tensor in list(proto.graph.initializer):
        name = stored_name(tensor.name)
        if name in program.tensors:
            value = program.tensors[name]
            _refill(tensor, value.t() if tensor.name in builder.turned else value)
    outputs = {index: proto.graph.node[index].output[0] for index in quantized}
    idle = unread(proto)
    kept_codes = restore(proto, builder, program)
    for index, node in quantized.items():
        name = str(node.args[1][0].target).partition("::")[0]  # type: ignore[index,union-attr]
        if name not in kept_codes:
            _to_matmul_nbits(proto, next(n for n in proto.graph.node if outputs[index] in n.output), name, program)
    tidy(proto, idle)
    return proto


def _again(program: Program, proto: Any, kept: Mapping[str, Any]) -> Builder:
    """The graph as it was captured, without the data of large tensors."""
    onnx = require("onnx", "onnx")
    stored: dict[str, Tensor] = {}
    for tensor in proto.graph.initializer:
        dtype, shape = DTYPES.get(tensor.data_type), tuple(tensor.dims)
        if dtype is None:
            continue
        empty = torch.empty(shape, dtype=dtype, device="meta")
        small = empty.nbytes <= 1024
        stored[tensor.name] = torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor))) if small else empty
    types = {name: Type(tuple(shape), getattr(torch, dtype)) for name, (dtype, *shape) in kept["types"].items()}
    opaque = {int(i): reason for i, reason in kept["opaque"].items()}
    inputs = [spec.name for spec in program.inputs]
    builder, _ = build(Source(proto, stored), types, inputs, [], opaque)
    builder.finish()
    return builder


def _matched(program: Program, builder: Builder) -> dict[int, fx.Node]:
    """The quantized linear layers by the index of their ONNX node; BackendError if anything else changed."""
    now = list(program.calls())
    then = list(builder.program.calls())
    same: dict[fx.Node, fx.Node] = dict(zip(builder.program.placeholders, program.placeholders, strict=True))
    found: dict[int, fx.Node] = {}
    if len(now) != len(then):
        raise _changed(f"it has {len(now)} calls, not {len(then)}")
    for old, new in zip(then, now, strict=True):
        old_args: Any = fx.node.map_aggregate((old.args, old.kwargs), lambda a: _key(a, same))
        new_args: Any = fx.node.map_aggregate((new.args, new.kwargs), lambda a: _key(a, {}))
        if (old.target, new.target) in QUANTIZED and old in builder.origin:
            before, after = list(old_args[0]), list(new_args[0])
            if new.target is qc.embedding:
                before[:2] = before[1::-1]
            weight, parts = before.pop(1), after.pop(1)
            if before != after or parts[0] != f"{weight}::codes":
                raise _changed(f'"{new.name}" reads something else')
            found[builder.origin[old]] = new
        elif old.target != new.target or old_args != new_args:
            raise _changed(f'"{new.name}" is not the original "{old.name}"')
        same[old] = new
    return found


def _key(value: Any, same: Mapping[fx.Node, fx.Node]) -> Any:
    """What an argument is compared by: a tensor by its name, a node by the program's own node."""
    if not isinstance(value, fx.Node):
        return value
    return str(value.target) if value.op == "get_attr" else same.get(value, value)


def _changed(how: str) -> BackendError:
    return BackendError(
        f"passes changed the graph so that it cannot be written back as ONNX: {how}; write the unchanged program, "
        "or one in which only the weights of linear layers were quantized"
    )


def _refill(tensor: Any, value: Tensor) -> None:
    """Give an initializer the program's value, unless it holds that already."""
    onnx = require("onnx", "onnx")
    if DTYPES[tensor.data_type] != value.dtype or tuple(tensor.dims) != tuple(value.shape):
        raise _changed(f'tensor "{tensor.name}" is now {value.dtype} {list(value.shape)}')
    held = tensor.raw_data or any(len(getattr(tensor, f)) for f in ("float_data", "int32_data", "int64_data"))
    if held and np.array_equal(onnx.numpy_helper.to_array(tensor), value.numpy(), equal_nan=value.is_floating_point()):
        return
    fill(tensor, value)


def _to_matmul_nbits(proto: Any, node: Any, name: str, program: Program) -> None:
    """Put MatMulNBits in the place of a MatMul or Gemm over the quantized weight `name`."""
    onnx, graph = require("onnx", "onnx"), proto.graph
    if node.op_type in ("Gather", "GatherBlockQuantized"):
        raise BackendError(f'"{name}" is a table of rows, which is written as it was or in floats; leave it out')
    weight = node.input[1]
    answer = packed(program.qtensor(name))
    if isinstance(answer, No):
        raise BackendError(f'"{name}" cannot be written as MatMulNBits: {answer.reason}')
    attributes, parts = answer
    names = {part: f"{weight}.{part}" for part in parts}
    present = {t.name for t in graph.initializer}
    for part, value in parts.items():
        if names[part] not in present:
            graph.initializer.append(onnx.numpy_helper.from_array(value, names[part]))
    place = 5 if node.op_type == "MatMulNBits" else 2
    bias = node.input[place] if len(node.input) > place else ""
    inputs = [node.input[0], names["codes"], names["scales"], names.get("zero_points", ""), "", bias]
    while not inputs[-1]:
        inputs.pop()
    made = onnx.helper.make_node(
        "MatMulNBits", inputs, list(node.output), name=node.name, domain="com.microsoft", **attributes
    )
    made.doc_string = node.doc_string
    node.CopyFrom(made)
    if all(o.domain != "com.microsoft" for o in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def packed(q: QTensor) -> tuple[dict[str, int], dict[str, Any]] | No:
    """Attributes and tensors of MatMulNBits for a weight [n, k], or why it cannot hold it."""
    bits, columns = q.scheme.bits, q.columns
    block = q.scheme.group_of(columns)
    if block == columns:  # a single group may end in codes that nothing reads
        block = max(16, 1 << (columns - 1).bit_length())
    if bits not in (2, 4, 8):
        return No(f"{bits} bits, not 2, 4 or 8")
    if block < 16 or block & (block - 1) or block > 256:
        return No(f"groups of {block}, not a power of two from 16 to 256")
    for part in ("minimum", "codebook", "boundaries", "permutation"):
        if getattr(q, part) is not None:
            return No(f"it has a {part}")
    if not isinstance(q.scale, Tensor) or q.axis != -1 or len(q.shape) != 2:
        return No("its scales are quantized themselves, or its groups run along another axis")
    rows, groups = q.rows, -(-columns // block)
    codes = torch.nn.functional.pad(q.unpacked(), (0, groups * block - columns))
    scales = q.scale.float().expand(rows, groups)
    parts = {
        "codes": pack_bits(codes, bits).view(rows, groups, block * bits // 8).numpy(),
        "scales": scales.contiguous().numpy(),
    }
    if q.zero is not None:
        parts["zero_points"] = pack_bits(q.zero.expand(rows, groups).contiguous(), bits).numpy()
    return {"K": columns, "N": rows, "bits": bits, "block_size": block}, parts
