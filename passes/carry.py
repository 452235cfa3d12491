"""Carry: the codes in which the source stored a tensor take the place of the floats decoded from them."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompiler.errors import No
from qcompiler.passes.rtn import layer_record
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor


@dataclass(frozen=True)
class Carry(Pass):
    """Use a quantized model's own codes (a GGUF file's, a checkpoint's, an ONNX model's) instead of quantizing again.

    A tensor that has changed since it was decoded keeps its floats, with a No that says so.
    """

    name: ClassVar[str] = "carry"
    contract: ClassVar[Contract] = Contract.LAYOUT
    preserves: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> None:
        """Put the codes in place of every float tensor that is still bit for bit what they stand for."""
        if not program.codes:
            ctx.refuse(No("the source stored no codes: its tensors are floats"))
        for name, record in program.codes.items():
            answer = unchanged(program, name, record)
            if isinstance(answer, No):
                ctx.refuse(answer)
                continue
            floats = program.tensors[name]
            program.quantize_tensor(name, record)
            ctx.layer(layer_record(name, floats, record, self.name, output_error=0.0))


def unchanged(program: Program, name: str, record: QTensor) -> bool | No:
    """True if the float tensor `name` has exactly the bits that `record` decodes to."""
    floats = program.tensors.get(name)
    if floats is None:
        return No("the tensor is gone or already quantized", where=name)
    decoded = record.dequantize()
    same = decoded.shape == floats.shape and decoded.dtype == floats.dtype
    if not same or not torch.equal(decoded.view(torch.int32), floats.contiguous().view(torch.int32)):
        return No("the tensor has changed since it was decoded; put carry before the pass that changes it", where=name)
    return True
