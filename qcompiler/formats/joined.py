"""Tensors that the pass fuse put one below the other, apart again: checkpoints know each by its own name."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompiler.program import Program
from qcompiler.scheme import QTensor


def members(program: Program) -> Iterator[tuple[str, "Tensor | QTensor"]]:
    """Every stored tensor by the name it had before `fuse`, floats and records.

    Joined biases have the rows of their weights, and the weights' names. A joined record that is not stored row by row
    is left out.
    """
    fused: dict[str, dict[str, int]] = program.info.get("fused", {})
    rows_of = fused | {_bias(name): {_bias(n): r for n, r in rows.items()} for name, rows in fused.items()}
    plain = [name for name in program.tensors if "::" not in name]
    for name in (*program.quantized, *plain):
        whole = program.qtensor(name) if name in program.quantized else program.tensors[name]
        rows, start = rows_of.get(name, {}), 0
        if not rows:
            yield name, whole
        for member, count in rows.items() if not isinstance(whole, QTensor) or whole.by_row else ():
            taken = torch.arange(start, start + count)
            yield member, whole.take(taken) if isinstance(whole, QTensor) else whole[start : start + count]
            start += count


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
