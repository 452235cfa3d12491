"""integers: a quantized linear layer over a rounded activation becomes one operator that multiplies codes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.passes.selection import weight_name
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rounding import activation_scheme, run_length
from qcompiler.scheme import QTensor


@dataclass(frozen=True)
class Integers(Pass):
    """Merge `qc.linear` with the `qc.fake_quantize` it reads into `qc.integer_linear`, where their groups nest.

    The meaning stays: sums of products of codes are exact, and only the order of the float roundings changes. Layers
    that cannot be merged stay as they are, with the reason.
    """

    name: ClassVar[str] = "integers"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, ctx: Context) -> None:
        for node in program.calls(qc.linear):
            source = node.args[0]
            if not isinstance(source, fx.Node) or source.target is not qc.fake_quantize:
                continue
            answer = multiplies(program.qtensor(weight_name(node)), str(source.kwargs["scheme"]))
            if isinstance(answer, No):
                ctx.refuse(answer.at(weight_name(node)))
                continue
            x, grid = source.args
            args = (x, node.args[1], grid, *node.args[2:3])
            program.replace(node, qc.integer_linear, args, {**node.kwargs, "scheme": source.kwargs["scheme"]})


def multiplies(weight: QTensor, activation: str) -> bool | No:
    """True if products of this weight's codes with those of an activation can be added up exactly, or a No.

    Integers with integers; or floats of 8 bits with such floats, or with integers of at most 4 bits, which such floats
    hold exactly.
    """
    kind = activation_scheme(activation)
    codes = f"{weight.scheme.code}{weight.scheme.bits}"
    if kind.code == "fp" and codes not in ("fp8", "int2", "int3", "int4"):
        return No(f"codes of {weight.scheme} are no floats of {kind}")
    if kind.code == "nf" or (kind.code == "int" and weight.scheme.code != "int"):
        return No(f"codes of {kind} and {weight.scheme} are not both integers")
    if not isinstance(weight.scale, Tensor) or weight.minimum is not None:
        return No("its weight has no integer zero point and float scale")
    if weight.permutation is not None or weight.boundaries is not None:
        return No("its columns are stored in another order or in groups of unequal size")
    if not run_length(weight.scheme, kind, weight.columns):
        return No(f"groups of {kind} and of {weight.scheme} do not nest")
    return True
