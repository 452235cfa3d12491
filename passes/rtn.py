"""Round-to-nearest: the data-free baseline of weight quantization."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompiler.errors import No
from qcompiler.passes.selection import BODY, check_coverage, select, weight_name
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.report import LayerRecord
from qcompiler.rounding import float8_weight
from qcompiler.scheme import QTensor, Scheme


@dataclass(frozen=True)
class Rtn(Pass):
    """Round each weight of the selected linear layers to the nearest code of its group's minimum-maximum grid.

    With fp8 (`fp8:channel`), to the nearest float of 8 bits (e4m3), scaled by the group's largest magnitude.
    """

    name: ClassVar[str] = "rtn"
    contract: ClassVar[Contract] = Contract.LOSSY

    scheme: Scheme = Scheme.parse("int4:g128")
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    min_coverage: float = 1.0

    def run(self, program: Program, ctx: Context) -> None:
        layers = select(program, self.include, self.exclude, ctx)
        names = dict.fromkeys(weight_name(node) for node in layers)
        done = 0
        for name in names:
            weight = program.tensors[name]
            if weight.dim() != 2:
                ctx.refuse(No(f"the weight has {weight.dim()} dimensions, not 2", name))
                continue
            rounded = float8_weight if self.scheme.code == "fp" else QTensor.quantize
            q = rounded(weight, self.scheme)
            ctx.layer(layer_record(name, weight, q, self.name))
            program.quantize_tensor(name, q)
            done += 1
        check_coverage(len(names), done, self.min_coverage)


def layer_record(name: str, weight: Tensor, q: QTensor, method: str, output_error: float | None = None) -> LayerRecord:
    """The report's line about one quantized weight."""
    noise = (weight.float() - q.dequantize().float()).pow(2).sum().clamp(min=1e-30)
    sqnr = 10 * (weight.float().pow(2).sum().clamp(min=1e-30) / noise).log10().item()
    return LayerRecord(name, str(q.scheme), sqnr, output_error, weight.nbytes, q.nbytes, method)
