"""A program as the GPU runs it: floats in 16 bits, weights packed, on the device; and what no kernel took."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.backends.triton.narrow import narrow
from qcompiler.errors import No
from qcompiler.kernels import linear_a8, linear_wq
from qcompiler.kernels.operators import qct
from qcompiler.kernels.packed_integers import PackedIntegers, runs_suit
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.records import split
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.target import Answer


@dataclass
class Lowered:
    """A program on a device, the kernels its layers got (by count), and every refusal."""

    program: Program
    device: torch.device
    kernels: dict[str, int] = field(default_factory=dict)
    refusals: list[No] = field(default_factory=list)


def lowered(program: Program, dtype: str, device: torch.device) -> Lowered:
    """A copy for the device. Layers that no kernel takes have their weights decoded, and a refusal says why."""
    copy = program.copy()
    if dtype:
        narrow(copy, getattr(torch, dtype))
    found = Lowered(copy, device)
    moved: dict[int, Tensor] = {}  # tied tensors stay one
    for name, tensor in copy.tensors.items():
        copy.tensors[name] = moved.setdefault(id(tensor), tensor.to(device))
    packed: dict[tuple[str, torch.dtype], tuple[list[Tensor], str]] = {}
    for node in copy.calls(qc.linear, qc.integer_linear):
        _place(found, node, packed)
    copy.clean()
    for node in copy.calls():
        node.args, node.kwargs = (_on(values, device) for values in (node.args, node.kwargs))
    return found


def _place(found: Lowered, node: fx.Node, packed: dict[Any, tuple[list[Tensor], str]]) -> None:
    """Give a quantized layer its kernel, or its decoded weight."""
    program = found.program
    name = str(node.args[1][0].target).partition("::")[0]  # type: ignore[index,union-attr]
    integers = node.target is qc.integer_linear
    answer = _integers_accept(program, node, name) if integers else linear_wq.ACCEPTS(program.qtensor(name))
    if isinstance(answer, No):
        found.refusals.append(answer.at(f"triton: {node.meta.get('path', node.name)}"))
        program.restore_tensor(name, program.qtensor(name).dequantize().to(node.meta["type"].dtype))
        found.kernels["decoded"] = found.kernels.get("decoded", 0) + 1
        return
    grid: Sequence[fx.Node] = node.args[2] if integers else ()  # type: ignore[assignment]
    key = (name, _inner(node), node.kwargs.get("scheme"), tuple(str(part.target) for part in grid))
    if key not in packed:
        weight = program.qtensor(name)
        if integers:
            tensors = [program.tensors[str(part.target)] for part in grid]
            packed[key] = split(PackedIntegers.pack(weight, str(node.kwargs["scheme"]), tensors))
        else:
            packed[key] = split(PackedWeight.pack(weight, _inner(node)))
    parts, spec = packed[key]
    with program.graph.inserting_before(node):
        stored = [program.store(f"{name}::packed{i}", part, like=node) for i, part in enumerate(parts)]
        for i, part in enumerate(stored):  # used again where a weight is
            program.tensors[str(part.target)] = parts[i]
    target = qct.linear_a8 if integers else qct.linear_wq
    bias = node.args[3:4] if integers else node.args[2:3]
    args = (node.args[0], stored, *([grid] if integers else []), *bias)
    program.replace(node, target, args, {"spec": spec})
    kernel = f"linear_w{program.qtensor(name).scheme.bits}{'a8' if integers else 'a16'}"
    found.kernels[kernel] = found.kernels.get(kernel, 0) + 1


def _integers_accept(program: Program, node: fx.Node, name: str) -> Answer:
    weight = program.qtensor(name)
    answer = linear_a8.SUITABLE(weight)
    if answer and weight.scheme.bits not in (4, 8):
        answer = No(f"{weight.scheme.bits} bits, not 4 or 8, times integers")
    return answer and runs_suit(weight, str(node.kwargs["scheme"]))


def _inner(node: fx.Node) -> torch.dtype:
    """The dtype that a layer's product is computed in: its own, or float16 where that is wider."""
    dtype: torch.dtype = node.meta["type"].dtype
    return dtype if dtype.itemsize == 2 else torch.float16


def _on(values: Any, device: torch.device) -> Any:
    """Arguments with every device in them replaced."""
    return fx.node.map_aggregate(values, lambda v: device if isinstance(v, torch.device) else v)
