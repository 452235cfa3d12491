"""QuaRot: rotations that make outliers go away (Ashkboos et al., arXiv 2404.00456).

A channel that is much louder than the others costs the others their precision when all are rounded on one grid. A
Hadamard matrix spreads each channel over all of them; where the weights around absorb it, the function stays the same.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qcompiler.errors import No, RecipeError, nearest
from qcompiler.hadamard import hadamard, random_rotation
from qcompiler.ops import qc
from qcompiler.passes.open_norms import open_norms
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.sites import Kind, Site, find

SITES = ("residual", "heads", "qk")


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate channels by random Hadamard matrices, folded into the weights that make and read them.

    `sites` says which: `residual` (the stream that linear layers and norms carry; norms are folded first, LayerNorm
    becomes RMSNorm, see open_norms.py, and a tied head gets a weight of its own), `heads` (values, up to the output
    projection), `qk` (queries and keys, where no rotary positions lie between). The sites come from the graph
    (section 4 of the paper goes by the names of Llama's layers).
    """

    name: ClassVar[str] = "rotate"
    contract: ClassVar[Contract] = Contract.EXACT

    sites: tuple[str, ...] = SITES

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in SITES:
                raise RecipeError(f'pass "rotate": there is no site "{site}"; {nearest(site, SITES)}')

    def run(self, program: Program, ctx: Context) -> None:
        if "residual" in self.sites:
            open_norms(program, ctx)
        random, done = ctx.generator(), Counter[str]()
        for kind, site in named_sites(program):
            if kind in self.sites:
                site.rotate(program, random_rotation(site.channels, random))
                done[_described(kind, site)] += 1
        for what, count in done.items():
            ctx.note(f"rotated by weights alone: {count} x {what}")
        if not done:
            ctx.refuse(No(f"no weights absorb a rotation, at any of {', '.join(self.sites)}"))


def _described(kind: str, site: Site) -> str:
    size = f"{site.blocks} x {site.channels}" if site.blocks > 1 else f"{site.channels}"
    how = "" if hadamard(site.channels) is not None else ", no Hadamard matrix of that size: a random rotation"
    return f"{kind}, {size} channels{how}"


def named_sites(program: Program) -> list[tuple[str, Site]]:
    """The sites to rotate, each with its name in `SITES`: what the attention says of it."""
    names: dict[str, str] = {}
    values: list[fx.Node] = []
    for node in program.calls(qc.attention):
        for name, value in zip(("qk", "qk", "heads"), node.args, strict=False):
            assert isinstance(value, fx.Node)
            names[value.name] = name
            values.append(value)
    return [
        (next((names[value] for value in site.seen), "residual"), site) for site in find(program, Kind.ROTATE, values)
    ]
