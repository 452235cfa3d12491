"""Weights that are no matrices, filters of convolutions and tensors of opaque operators, made such: rows get scales."""

import torch
from torch import fx

from qcompiler.axis_rules import CUTS, MOVES
from qcompiler.ops import qc
from qcompiler.program import Program, Type

aten = torch.ops.aten
SMALL = 4096  # entries of a tensor that is not worth rounding
VIEWS = (*MOVES, *CUTS, aten.cat.default, aten.transpose.int, aten.permute.default, aten.t.default)


def as_matrix(program: Program, source: fx.Node, rows: int) -> str:
    """Store the tensor that the get_attr node `source` reads as a matrix, rows along its first `rows` axes.

    Who read the tensor reads a view of the matrix, whose name is returned.
    """
    tensor, reader = program.tensors[str(source.target)], next(iter(source.users))
    with program.graph.inserting_before(source.next):
        matrix = program.store(f"{source.target}.matrix", tensor.flatten(rows).flatten(0, rows - 1), like=reader)
        kind = Type(tuple(tensor.shape), tensor.dtype)
        view = program.call(aten.reshape.default, (matrix, list(tensor.shape)), like=reader, type=kind)
    for node in (matrix, view):  # what is lowered of them leaves the reader its own name
        node.meta["path"] = f"{reader.meta.get('path', '')}.weight"
    source.replace_all_uses_with(view)
    return str(matrix.target)


def read_by_opaque(program: Program) -> list[str]:
    """The names of the large float tensors that opaque operators alone read, or views of them, each made a matrix.

    Its rows are those of the first axis with more than one entry: outputs, as a rule.
    """
    found, reads = [], [node for node in program.graph.nodes if node.op == "get_attr"]
    for source in reads:
        tensor = program.tensors[str(source.target)]
        weight = tensor.dtype.is_floating_point and tensor.dim() > 1 and tensor.numel() >= SMALL
        alone = sum(other.target == source.target for other in reads) == 1
        if weight and alone and source.users and all(map(_ends_opaque, source.users)):
            rows = next(i for i, size in enumerate(tensor.shape, start=1) if size > 1)
            found.append(as_matrix(program, source, rows))
    return found


def _ends_opaque(user: fx.Node) -> bool:
    """Whether an opaque operator reads what comes here, and nothing else computes with it."""
    if user.target is qc.onnx:
        return True
    return user.target in VIEWS and bool(user.users) and all(map(_ends_opaque, user.users))
