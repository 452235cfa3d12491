"""Round-to-nearest: the data-free baseline of weight quantization."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.axis_convolutions import CONVOLUTIONS
from qcompiler.errors import No
from qcompiler.passes.matrices import as_matrix, read_by_opaque
from qcompiler.passes.selection import BODY, check_coverage, convolutions_of, select
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.report import LayerRecord
from qcompiler.rounding import float8_weight
from qcompiler.scheme import QTensor, Scheme

aten = torch.ops.aten


@dataclass(frozen=True)
class Rtn(Pass):
    """Round each weight of the selected linear layers to the nearest code of its group's minimum-maximum grid.

    With `convolutions` also those of convolutions, whose filters [n, ...] are rounded as matrices [n, all the rest].
    `embeddings` is the scheme of tables that are looked up, `opaque` that of what operators without an equivalent read
    (recurrent layers, subgraphs of ONNX models); without one they stay float.
    With fp8 (`fp8:channel`), to the nearest float of 8 bits (e4m3), scaled by the group's largest magnitude.
    """

    name: ClassVar[str] = "rtn"
    contract: ClassVar[Contract] = Contract.LOSSY

    scheme: Scheme = Scheme.parse("int4:g128")
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    min_coverage: float = 1.0
    convolutions: bool = False
    embeddings: Scheme | None = None
    opaque: Scheme | None = None

    def run(self, program: Program, ctx: Context) -> None:
        layers = program.linears()
        layers += convolutions_of(program) if self.convolutions else []
        layers = select(program, self.include, self.exclude, ctx, layers)
        for node in layers:
            if node.target in CONVOLUTIONS:
                as_matrix(program, node.all_input_nodes[1], 1)
        schemes = dict.fromkeys(tables(program), self.embeddings) if self.embeddings else {}
        schemes |= dict.fromkeys(read_by_opaque(program), self.opaque) if self.opaque else {}
        schemes |= dict.fromkeys(map(weight_of, layers), self.scheme)

        def rounded(name: str, weight: Tensor) -> QTensor:
            scheme = schemes[name]
            return float8_weight(weight, scheme) if scheme.code == "fp" else QTensor.quantize(weight, scheme)

        quantize_each(program, ctx, schemes, rounded, self.name, self.min_coverage)


def quantize_each(
    program: Program,
    ctx: Context,
    names: Collection[str],
    quantized: Callable[[str, Tensor], QTensor],
    method: str,
    min_coverage: float,
) -> None:
    """Quantize stored matrices [n, k] one by one, each by itself; what is no matrix is refused, and stays float."""
    done = 0
    for name in names:
        weight = program.tensors[name]
        if weight.dim() != 2:
            ctx.refuse(No(f"the weight has {weight.dim()} dimensions, not 2", name))
            continue
        q = quantized(name, weight)
        ctx.layer(layer_record(name, weight, q, method))
        program.quantize_tensor(name, q)
        done += 1
    check_coverage(len(names), done, min_coverage)


def weight_of(node: fx.Node) -> str:
    """The name of the stored matrix that a layer, or the view that it reads, stands on."""
    source = node.args[1]
    if isinstance(source, fx.Node) and source.target is aten.reshape.default:
        source = source.args[0]
    assert isinstance(source, fx.Node)
    return str(source.target)


def tables(program: Program) -> list[str]:
    """The names of the float tables that embeddings look up."""
    found = (node.args[0] for node in program.calls(aten.embedding.default))
    return [str(source.target) for source in found if program.tensor_of(source) is not None]  # type: ignore[union-attr]


def layer_record(name: str, weight: Tensor, q: QTensor, method: str, output_error: float | None = None) -> LayerRecord:
    """The report's line about one quantized weight."""
    noise = (weight.float() - q.dequantize().float()).pow(2).sum().clamp(min=1e-30)
    sqnr = 10 * (weight.float().pow(2).sum().clamp(min=1e-30) / noise).log10().item()
    return LayerRecord(name, str(q.scheme), sqnr, output_error, weight.nbytes, q.nbytes, method)
