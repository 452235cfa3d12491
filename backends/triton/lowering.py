"""A program as the GPU runs it: floats in 16 bits, weights packed, on the device; and what no kernel took."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.backends.triton.narrow import narrow
from qcompiler.backends.triton.norms import codes_of_norm, fuse_norms
from qcompiler.errors import No
from qcompiler.kernels import linear_a8, linear_wq
from qcompiler.kernels.operators import qct
from qcompiler.kernels.packed_integers import PackedIntegers, runs_suit
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.records import split
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.rounding import activation_scheme
from qcompiler.scheme import QTensor
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
    layers = _accepted(found)
    if norms := fuse_norms(copy, layers):
        found.kernels["norm_quantize"] = norms
    packed: dict[tuple[Any, ...], tuple[list[Tensor], str]] = {}
    for node in layers:
        _place(found, node, packed)
    copy.clean()
    for node in copy.calls():
        node.args, node.kwargs = (_on(values, device) for values in (node.args, node.kwargs))
    return found


def _accepted(found: Lowered) -> list[fx.Node]:
    """The quantized layers that a kernel takes; the others' weights are decoded."""
    program, taken = found.program, []
    refused: dict[str, torch.dtype] = {}
    for node in program.calls(qc.linear, qc.integer_linear):
        name = _weight(node)
        answer = _integers_accept(node, program.qtensor(name))
        if node.target is qc.linear:
            answer = linear_wq.ACCEPTS(program.qtensor(name))
        if isinstance(answer, No):
            found.refusals.append(answer.at(f"triton: {node.meta.get('path', node.name)}"))
            found.kernels["decoded"] = found.kernels.get("decoded", 0) + 1
            refused[name] = node.meta["type"].dtype
        else:
            taken.append(node)
    for name, dtype in refused.items():
        program.restore_tensor(name, program.qtensor(name).dequantize().to(dtype))
    return [node for node in taken if _weight(node) not in refused]


def _place(found: Lowered, node: fx.Node, packed: dict[tuple[Any, ...], tuple[list[Tensor], str]]) -> None:
    """Put a kernel's operator in the place of a quantized layer."""
    program, name, integers = found.program, _weight(node), node.target is qc.integer_linear
    weight = program.qtensor(name)
    grid: Sequence[fx.Node] = node.args[2] if integers else ()  # type: ignore[assignment]
    key = (name, _inner(node), node.kwargs.get("scheme"), tuple(str(part.target) for part in grid))
    if key not in packed and integers:
        tensors = [program.tensors[str(part.target)] for part in grid]
        packed[key] = split(PackedIntegers.pack(weight, str(node.kwargs["scheme"]), tensors))
    elif key not in packed:
        packed[key] = split(PackedWeight.pack(weight, _inner(node)))
    parts, spec = packed[key]
    with program.graph.inserting_before(node):
        stored = [program.store(f"{name}::packed{i}", part, like=node) for i, part in enumerate(parts)]
    if codes := codes_of_norm(node):
        kwargs = {"spec": spec, "dtype": node.meta["type"].dtype}
        program.replace(node, qct.linear_codes, (*codes, stored, *node.args[3:4]), kwargs)
    elif integers:
        program.replace(node, qct.linear_a8, (node.args[0], stored, grid, *node.args[3:4]), {"spec": spec})
    else:
        program.replace(node, qct.linear_wq, (node.args[0], stored, *node.args[2:3]), {"spec": spec})
    kernel = f"linear_w{weight.scheme.bits}{'a8' if integers else 'a16'}"
    found.kernels[kernel] = found.kernels.get(kernel, 0) + 1


def _weight(node: fx.Node) -> str:
    """The name of a quantized layer's weight."""
    return str(node.args[1][0].target).partition("::")[0]  # type: ignore[index,union-attr]


def _integers_accept(node: fx.Node, weight: QTensor) -> Answer:
    if node.target is not qc.integer_linear:
        return True
    scheme = str(node.kwargs["scheme"])
    kind = activation_scheme(scheme)
    if kind.dynamic and kind.granularity != "token":
        return No(f"an activation {scheme} has scales within a token, and the kernel takes one of each token")
    if weight.scheme.bits not in (4, 8):
        return No(f"{weight.scheme.bits} bits times integers, not 4 or 8")
    return linear_a8.SUITABLE(weight) and runs_suit(weight, scheme)


def _inner(node: fx.Node) -> torch.dtype:
    """The dtype that a layer's product is computed in: its own, or float16 where that is wider."""
    dtype: torch.dtype = node.meta["type"].dtype
    return dtype if dtype.itemsize == 2 else torch.float16


def _on(values: Any, device: torch.device) -> Any:
    """Arguments with every device in them replaced."""
    return fx.node.map_aggregate(values, lambda v: device if isinstance(v, torch.device) else v)
