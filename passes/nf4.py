"""NF4: weights as quantiles of a normal distribution, block by block (QLoRA, arXiv 2305.14314)."""

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.codebooks import BLOCKS, quantize_blocks
from qcompiler.errors import No, RecipeError
from qcompiler.passes.rtn import layer_record
from qcompiler.passes.selection import BODY, check_coverage, select, weight_name
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program


@dataclass(frozen=True)
class Nf4(Pass):
    """Round weights to the nearest of 16 values over blocks scaled by their largest magnitude; needs no data.

    `block` is 32 to 4096 values of the flattened weight, as in bitsandbytes; where it does not divide the rows, blocks
    cross them, and few backends take the result. `double` quantizes the blocks' scales to 8 bits too: 4.13 bits a
    weight instead of 4.5 with blocks of 64.
    """

    name: ClassVar[str] = "nf4"
    contract: ClassVar[Contract] = Contract.LOSSY

    block: int = 64
    double: bool = False
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    min_coverage: float = 1.0

    def run(self, program: Program, ctx: Context) -> None:
        if self.block not in BLOCKS:
            raise RecipeError(f"{self.name}: block is {self.block}; it must be one of {', '.join(map(str, BLOCKS))}")
        names = dict.fromkeys(weight_name(node) for node in select(program, self.include, self.exclude, ctx))
        done = 0
        for name in names:
            weight = program.tensors[name]
            if weight.dim() != 2:
                ctx.refuse(No(f"the weight has {weight.dim()} dimensions, not 2", name))
                continue
            q = quantize_blocks(weight, self.name, self.block, self.double)
            ctx.layer(layer_record(name, weight, q, self.name))
            program.quantize_tensor(name, q)
            done += 1
        check_coverage(len(names), done, self.min_coverage)
