"""A program as the GPU runs it: floats in 16 bits, weights packed, on the device; and what no kernel took."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.backends.triton.narrow import narrow
from qcompiler.backends.triton.norms import codes_of_norm, fuse_norms, weight_name
from qcompiler.errors import No
from qcompiler.kernels import linear_a8, linear_float8, linear_gguf, linear_nf4, linear_wq
from qcompiler.kernels.cost import H200, Device, device_at
from qcompiler.kernels.operators import qct
from qcompiler.kernels.packed_blocks import PackedBlocks
from qcompiler.kernels.packed_float8 import PackedFloat8
from qcompiler.kernels.packed_integers import PackedIntegers, runs_suit
from qcompiler.kernels.packed_weight import PackedWeight
from qcompiler.kernels.records import split
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.rounding import activation_scheme
from qcompiler.scheme import QTensor
from qcompiler.target import Answer, Kernel

PACKED: dict[Kernel, Any] = {
    linear_wq.KERNEL: PackedWeight,
    linear_nf4.KERNEL: linear_nf4.PackedCodebook,
    linear_gguf.KERNEL: PackedBlocks,
}
CODED: dict[Kernel, Any] = {
    linear_a8.W4A8: PackedIntegers,
    linear_a8.W8A8: PackedIntegers,
    linear_float8.W4F8: PackedFloat8,
    linear_float8.W8F8: PackedFloat8,
}
FLOATS = (linear_float8.W4F8, linear_float8.W8F8)


@dataclass
class Lowered:
    """A program on a device, the kernels its layers got (by count), and every refusal."""

    program: Program
    device: torch.device
    kernels: dict[str, int] = field(default_factory=dict)
    refusals: list[No] = field(default_factory=list)

    def count(self, kernel: str) -> None:
        """One more layer has this kernel."""
        self.kernels[kernel] = self.kernels.get(kernel, 0) + 1


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
    packed: dict[Any, tuple[list[Tensor], str]] = {}
    for node, kernel in layers.items():
        _place(found, node, kernel, packed)
    copy.clean()
    for node in copy.calls():
        node.args, node.kwargs = (_on(values, device) for values in (node.args, node.kwargs))
    return found


def _accepted(found: Lowered) -> dict[fx.Node, Kernel]:
    """The quantized layers that a kernel takes, and which; the others' weights are decoded."""
    program, taken = found.program, dict[fx.Node, Kernel]()
    gpu = gpu_of(found.device)
    refused: dict[str, torch.dtype] = {}
    for node in program.calls(qc.linear, qc.integer_linear):
        answer = kernel_for(node, program.qtensor(weight_name(node)), gpu)
        if isinstance(answer, No):
            found.refusals.append(answer.at(f"triton: {node.meta.get('path', node.name)}"))
            found.count("decoded")
            refused[weight_name(node)] = node.meta["type"].dtype
        else:
            taken[node] = answer
    for name, dtype in refused.items():
        program.restore_tensor(name, program.qtensor(name).dequantize().to(dtype))
    return {node: kernel for node, kernel in taken.items() if weight_name(node) not in refused}


def gpu_of(device: torch.device) -> Device:
    """What is known of the GPU, or of the one that kernels are laid out for."""
    if device.type != "cuda":
        return H200
    return device_at(torch.cuda.current_device() if device.index is None else device.index)


def kernel_for(node: fx.Node, weight: QTensor, gpu: Device = H200) -> Kernel | No:
    """The first kernel that takes a layer, or every reason why none does."""
    kernels = list(PACKED)
    if node.target is qc.integer_linear:
        scheme = str(node.kwargs["scheme"])
        floats = activation_scheme(scheme).code == "fp"
        answer = _activation_suits(scheme, weight)
        answer = linear_float8.runs_on(gpu) if floats and answer else answer
        if isinstance(answer, No):
            return answer
        kernels = [kernel for kernel in CODED if (kernel in FLOATS) == floats]
    reasons = []
    for kernel in kernels:
        answer = kernel.accepts(weight)
        if answer:
            return kernel
        reasons.append(f"{kernel.name}: {getattr(answer, 'reason', '')}")
    return No("; ".join(reasons))


def _activation_suits(scheme: str, weight: QTensor) -> Answer:
    kind = activation_scheme(scheme)
    if kind.dynamic and kind.granularity != "token":
        return No(f"an activation {scheme} has scales within a token, and the kernel takes one of each token")
    return runs_suit(weight, scheme)


def _place(found: Lowered, node: fx.Node, kernel: Kernel, packed: dict[Any, tuple[list[Tensor], str]]) -> None:
    """Put a kernel's operator in the place of a quantized layer."""
    program, name, integers = found.program, weight_name(node), node.target is qc.integer_linear
    grid: Sequence[fx.Node] = node.args[2] if integers else ()  # type: ignore[assignment]
    key = (name, _inner(node), node.kwargs.get("scheme"), tuple(str(part.target) for part in grid))
    if key not in packed:
        weight = program.qtensor(name)
        tensors = [program.tensors[str(part.target)] for part in grid]
        record = CODED[kernel].pack(weight, str(node.kwargs["scheme"]), tensors) if integers else None
        packed[key] = split(record or PACKED[kernel].pack(weight, _inner(node)))
    parts, spec = packed[key]
    with program.graph.inserting_before(node):
        stored = [program.store(f"{name}::packed{i}", part, like=node) for i, part in enumerate(parts)]
    if codes := codes_of_norm(node):
        kwargs = {"spec": spec, "dtype": node.meta["type"].dtype}
        program.replace(node, qct.linear_codes, (*codes, stored, *node.args[3:4]), kwargs)
    elif integers:
        program.replace(node, qct.linear_a8, (node.args[0], stored, grid, *node.args[3:4]), {"spec": spec})
    else:
        program.replace(node, qct.linear, (node.args[0], stored, *node.args[2:3]), {"spec": spec})
    found.count(kernel.name)


def _inner(node: fx.Node) -> torch.dtype:
    """The dtype that a layer's product is computed in: its own, or float16 where that is wider."""
    dtype: torch.dtype = node.meta["type"].dtype
    return dtype if dtype.itemsize == 2 else torch.float16


def _on(values: Any, device: torch.device) -> Any:
    """Arguments with every device in them replaced."""
    return fx.node.map_aggregate(values, lambda v: device if isinstance(v, torch.device) else v)
