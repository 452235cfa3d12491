"""Norms that round what they make: the sum before a norm, the norm and the rounding after it in one launch."""

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.kernels.norm_quantize import NormQuantize
from qcompiler.kernels.operators import qct
from qcompiler.kernels.quantize import code_dtypes
from qcompiler.kernels.records import split
from qcompiler.ops import qc
from qcompiler.program import Program, Type
from qcompiler.rewrite import named_arguments
from qcompiler.rounding import activation_scheme, run_length

aten = torch.ops.aten
NORMS: dict[Any, str] = {aten.rms_norm.default: "rms", aten.layer_norm.default: "layer", qc.reordered_norm: ""}


def fuse_norms(program: Program, layers: Container[fx.Node]) -> int:
    """Let every norm that feeds only some of these integer layers, of one rounding, store codes; returns how many do.

    Weights with zero points take the sums of runs of codes too, and so must have runs of one length. `codes_of_norm`
    then tells what such a layer reads instead of its input.
    """
    fused = 0
    for node in program.calls(*NORMS):
        readers = list(node.users)
        if not readers or any(reader not in layers or not _same_rounding(reader, readers[0]) for reader in readers):
            continue
        scheme = activation_scheme(str(readers[0].kwargs["scheme"]))
        width = node.meta["type"].shape[-1]
        if (scheme.dynamic and scheme.granularity != "token") or not isinstance(width, int):
            continue
        runs = {counted(program, reader) for reader in readers} - {0}
        if len(runs) > 1:
            continue
        _fuse(program, node, readers, *runs)
        fused += 1
    return fused


def counted(program: Program, node: fx.Node) -> int:
    """Of how many columns an integer layer needs the sums of its input's codes; 0 is none."""
    weight = program.qtensor(weight_name(node))
    kind = activation_scheme(str(node.kwargs["scheme"]))
    centered = weight.zero is None if kind.code == "int" else weight.codebook is not None
    return 0 if centered else run_length(weight.scheme, kind, weight.columns)


def weight_name(node: fx.Node) -> str:
    """The name of a quantized layer's weight."""
    return str(node.args[1][0].target).partition("::")[0]  # type: ignore[index,union-attr]


def codes_of_norm(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Codes, scale, zero point and sums, where the layer's input is a norm that stores these."""
    found: tuple[fx.Node, ...] | None = node.meta.get("codes")
    return found


def _same_rounding(reader: fx.Node, first: fx.Node) -> bool:
    if reader.target is not qc.integer_linear or reader.kwargs["scheme"] != first.kwargs["scheme"]:
        return False
    mine, theirs = ([str(part.target) for part in node.args[2]] for node in (reader, first))  # type: ignore[union-attr]
    return mine == theirs


def _fuse(program: Program, node: fx.Node, readers: list[fx.Node], run: int = 0) -> None:
    given = _parameters(program, node)
    grid = tuple(program.tensors[str(part.target)] for part in readers[0].args[2])  # type: ignore[union-attr]
    norm = NormQuantize.pack(*given, grid, **_kind(node), scheme=str(readers[0].kwargs["scheme"]), run=run)
    x = node.args[0]
    assert isinstance(x, fx.Node)
    kind = x.meta["type"]
    whole = x.target is aten.add.Tensor and not x.kwargs and all(_like(a, kind) for a in x.args) and _first(x) is node
    with program.graph.inserting_before(node):
        parts, spec = split(norm)
        stored = [program.store(f"{node.name}::norm{i}", part, like=node) for i, part in enumerate(parts)]
        lead, runs = kind.shape[:-1], -(-kind.shape[-1] // run) if run else 0
        rounded, summed = code_dtypes(activation_scheme(norm.scheme))
        sums = Type((runs, *lead), summed)
        types = (Type(kind.shape, rounded), *[Type(lead, torch.float32)] * 2, sums, kind)
        args = (*(x.args if whole else (x, None)), stored)
        called = program.call(qct.norm_quantize, args, {"spec": spec}, like=node, type=types)
        pieces = [program.call(operator.getitem, (called, i), like=node, type=types[i]) for i in range(5)]
    for reader in readers:
        reader.meta["codes"] = tuple(pieces[:4])
    if whole:  # what reads the sum, reads the kernel's; it comes no earlier than the norm
        for user in [user for user in x.users if user is not node]:
            user.replace_input_with(x, pieces[4])


def _first(value: fx.Node) -> fx.Node:
    """The first in the graph of those that read a value."""
    node = value.next
    while node not in value.users:
        node = node.next
    return node


def _like(value: Any, kind: Type) -> bool:
    return isinstance(value, fx.Node) and value.op != "get_attr" and value.meta["type"] == kind


def _parameters(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and order, the weight in ones where there is none."""
    given = named_arguments(node)
    weight, bias, order = (program.tensor_of(given.get(name)) for name in ("weight", "bias", "order"))
    width = node.meta["type"].shape[-1]
    device = next(iter(program.tensors.values())).device
    return torch.ones(width, device=device) if weight is None else weight, bias, order


def _kind(node: fx.Node) -> dict[str, Any]:
    given = named_arguments(node)
    eps = given["eps"]
    default = torch.finfo(node.meta["type"].dtype).eps  # rms_norm's
    return {"kind": given.get("kind") or NORMS[node.target], "eps": default if eps is None else eps}
