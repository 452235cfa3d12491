"""Pack: store every quantized tensor in its smallest lossless form."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor


@dataclass(frozen=True)
class Pack(Pass):
    """Store every quantized tensor in its smallest lossless form; each stays bit-identical when dequantized.

    Float32 scales and minima that float16 holds exactly become float16; zero points that all equal the symmetric
    one are dropped.
    """

    name: ClassVar[str] = "pack"
    contract: ClassVar[Contract] = Contract.LAYOUT
    preserves: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> None:
        for name in list(program.quantized):
            before = program.qtensor(name)
            after = smallest(before)
            if after.nbytes < before.nbytes:
                ctx.note(f"{name}: {before.nbytes} -> {after.nbytes} bytes")
                program.replace_qtensor(name, after)


def smallest(q: QTensor) -> QTensor:
    """The smallest record that dequantizes to the same bits."""
    changes: dict[str, torch.Tensor | None] = {}
    for part in ("scale", "minimum"):
        value = getattr(q, part)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            half = value.half()
            if torch.equal(half.float(), value):
                changes[part] = half
    middle = q.scheme.levels >> 1
    if q.zero is not None and q.codebook is None and q.minimum is None and bool((q.zero == middle).all()):
        changes["zero"] = None
    return q.with_parts(**changes) if changes else q
