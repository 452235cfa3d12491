"""A third-party method: clip each row of a weight where that lowers the rounding error, then round to nearest.

pip install examples/plugin_clip
qcompiler compile MODEL -r "canonicalize, clip{scheme=int3:channel}, fuse, kv_cache, pack" -o OUT
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompiler import Context, Contract, No, Pass, Plugin, Program, QTensor, Scheme


@dataclass(frozen=True)
class Clip(Pass):
    """Round weights to nearest on the range, at least `lowest` of the full one, with the least squared error."""

    name: ClassVar[str] = "clip"
    contract: ClassVar[Contract] = Contract.LOSSY
    scheme: Scheme = Scheme.parse("int4:channel")
    lowest: float = 0.5
    steps: int = 20

    def run(self, program: Program, ctx: Context) -> None:
        for node in ctx.each(program.linears(), "clipping"):
            name = str(node.args[1].target)
            if name in program.tensors:  # a weight that two layers share is quantized once
                program.quantize_tensor(name, self.quantize(program.tensors[name]))
        if not program.quantized:
            ctx.refuse(No("the model has no linear layers"))

    def quantize(self, weight: torch.Tensor) -> QTensor:
        limit = best = weight.float().abs().amax(-1, keepdim=True)
        least = torch.full_like(limit, torch.inf)
        for share in torch.linspace(1, self.lowest, self.steps):
            q = QTensor.quantize(weight.float().clamp(-limit * share, limit * share), self.scheme)
            error = (weight.float() - q.dequantize()).square().sum(-1, keepdim=True)
            best = torch.where(error < least, limit * share, best)
            least = torch.minimum(error, least)
        return QTensor.quantize(weight.clamp(-best.to(weight.dtype), best.to(weight.dtype)), self.scheme)


PLUGIN = Plugin(passes=(Clip,))
