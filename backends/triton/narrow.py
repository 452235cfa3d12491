"""narrow: the floats that stand for the model's state become 16 bits wide; positions and grids stay as they are.

What comes from an embedding, a linear layer, attention or a float input is state, and so is what is computed from
state. Rotary angles, masks and the grids of rounded activations are not: in 16 bits the angle of a late position would
be another one.
"""

from typing import Any

import torch
from torch import fx

from qcompiler.ops import qc
from qcompiler.program import Input, Program, Type

aten = torch.ops.aten
SOURCES = (
    aten.embedding.default,
    aten.linear.default,
    aten.convolution.default,
    qc.linear,
    qc.integer_linear,
    qc.embedding,
    qc.attention,
    qc.cached_attention,
)
MIXED = (qc.rope, qc.attention, qc.cached_attention)  # take angles, masks and biases in any dtype
COPIES = (aten._to_copy.default,)


def narrow(program: Program, dtype: torch.dtype) -> None:
    """Change a float32 program to `dtype` in place; one in another dtype is left alone. Logits stay float32."""
    for node in [n for n in program.graph.nodes if n.op == "placeholder"]:
        _narrow_input(program, node, dtype)
    state = {node for node in program.graph.nodes if node.op == "placeholder" and _is(node, dtype)}
    for node in program.calls():
        if not _is(node, torch.float32) or _asks_for_float(node):
            continue
        if node.target in SOURCES or any(source in state for source in node.all_input_nodes):
            _narrow_node(program, node, dtype)
            state.add(node)
    _widen_outputs(program)
    program.clean()


def _is(node: fx.Node, dtype: torch.dtype) -> bool:
    kind = node.meta.get("type")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return any(isinstance(k, Type) and k.dtype == dtype for k in kinds)


def _asks_for_float(node: fx.Node) -> bool:
    return node.target in COPIES and node.kwargs.get("dtype") == torch.float32


def _narrow_input(program: Program, node: fx.Node, dtype: torch.dtype) -> None:
    """Caches become narrow; another float input is copied into `dtype` first."""
    if not _is(node, torch.float32):
        return
    spec = next(i for i in program.inputs if i.name == node.target)
    narrowed = Type(spec.type.shape, dtype)
    if spec.default == "empty":
        node.meta["type"] = narrowed
        program.inputs = tuple(Input(i.name, narrowed, i.default) if i is spec else i for i in program.inputs)
        return
    users = list(node.users)
    with program.graph.inserting_after(program.placeholders[-1]):
        copy = program.call(aten._to_copy.default, (node,), {"dtype": dtype}, like=node, type=narrowed)
    for user in users:
        user.replace_input_with(node, copy)


def _narrow_node(program: Program, node: fx.Node, dtype: torch.dtype) -> None:
    """The node's float32 operands as `dtype`, and its own type."""
    with program.graph.inserting_before(node):
        node.args = tuple(_narrowed(program, node, a, dtype) for a in node.args)
        node.kwargs = {name: _narrowed(program, node, a, dtype) for name, a in node.kwargs.items()}
    kind = node.meta["type"]
    kinds = tuple(_narrow_type(k, dtype) for k in (kind if isinstance(kind, tuple) else (kind,)))
    node.meta["type"] = kinds if isinstance(kind, tuple) else kinds[0]


def _narrow_type(kind: Any, dtype: torch.dtype) -> Any:
    return Type(kind.shape, dtype) if isinstance(kind, Type) and kind.dtype == torch.float32 else kind


def _narrowed(program: Program, user: fx.Node, value: Any, dtype: torch.dtype) -> Any:
    """One operand; those in lists are the parts of quantized tensors and grids, except where lists are joined."""
    if isinstance(value, (list, tuple)) and user.target in (aten.cat.default, aten.stack.default):
        return [_narrowed(program, user, v, dtype) for v in value]
    if value is torch.float32:
        return dtype
    if not isinstance(value, fx.Node) or not _is(value, torch.float32):
        return value
    if value.op == "get_attr":
        name = f"{value.target}::{str(dtype).removeprefix('torch.')}"
        if name not in program.tensors:
            program.tensors[name] = program.tensors[str(value.target)].to(dtype)
        return program.get(name, like=value)
    if user.target in MIXED:
        return value
    return program.call(
        aten._to_copy.default, (value,), {"dtype": dtype}, like=value, type=_narrow_type(value.meta["type"], dtype)
    )


def _widen_outputs(program: Program) -> None:
    """Outputs that are no caches are float32 again, as whoever asks expects."""
    caches = set(program.info.get("caches", {}).values())
    values = list(program.output_node.args[0])  # type: ignore[arg-type]
    for place, (name, value) in enumerate(zip(program.outputs, values, strict=True)):
        kind = value.meta["type"]
        if name in caches or kind.dtype not in (torch.bfloat16, torch.float16):
            continue
        with program.graph.inserting_before(program.output_node):
            wide = Type(kind.shape, torch.float32)
            values[place] = program.call(
                aten._to_copy.default, (value,), {"dtype": torch.float32}, like=value, type=wide
            )
    program.output_node.args = (values,)
