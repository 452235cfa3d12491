"""Equalize: cross-layer equalization, data-free (Nagel et al., arXiv 1906.04721, section 4.1).

Where the channels of one weight are read by the next, large ones in the first are often small in the second, and one
grid for a whole tensor wastes its codes on both. Factors between them give each channel the same range in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import No
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.sites import Kind, Site, find_with_ends


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale the channels between weights so that what makes a channel and what reads it have one range.

    With range r1 of a channel in what makes it and r2 in what reads it, the first is divided by s = sqrt(r1 r2) / r2
    and the second multiplied; ranges are largest magnitudes, over all weights on that side. A weight may stand on both
    sides, so this goes on site by site until no factor is further than `tolerance` from 1, `rounds` rounds at most.
    The sites are all that lie between weights: besides the paper's neighbouring layers a value's and the output
    projection, and queries with keys, whose factors are each other's inverse. What only a norm makes is refused: its
    weight is not rounded. With one scale a row equal rows gain nothing, so this is for one scale a tensor and for
    groups of columns. The paper's absorption of large biases and its bias correction are not done.
    """

    name: ClassVar[str] = "equalize"
    contract: ClassVar[Contract] = Contract.EXACT

    rounds: int = 50
    tolerance: float = 1e-3

    def run(self, program: Program, ctx: Context) -> None:
        """Find all factors, then scale site by site."""
        found, ends = find_with_ends(program, Kind.SCALE)
        sites = []
        for end in ends:
            ctx.refuse(end)
        for site in found:
            if all(bool(side.any()) for side in ranges(program, site)):
                sites.append(site)
            else:
                ctx.refuse(No("no weights on both sides of its channels", str(site)))
        for site, factors in zip(sites, self._factors(program, sites, ctx), strict=True):
            site.scale(program, factors)

    def _factors(self, program: Program, sites: Sequence[Site], ctx: Context) -> list[Tensor]:
        """Factors [blocks, channels] of each site, found on a copy: the weights are rounded to their dtype once."""
        copy = program.copy()
        copy.tensors |= {use.tensor: copy.tensors[use.tensor].float() for site in sites for use in site.uses}
        totals, change = [torch.ones(site.blocks, site.channels) for site in sites], 1.0
        for _ in range(self.rounds):
            change = 1.0
            for site, total in zip(sites, totals, strict=True):
                factors = equal_ranges(*ranges(copy, site))
                site.scale(copy, factors)
                total.mul_(factors)
                change = max(change, float(factors.max()), 1 / float(factors.min()))
            if change <= 1 + self.tolerance:
                return totals
        ctx.note(f"the last of {self.rounds} rounds still changed a channel by a factor of {change:.4g}")
        return totals


def equal_ranges(made: Tensor, read: Tensor) -> Tensor:
    """What to multiply the first by, and to divide the second by, so that both become sqrt(made * read)."""
    return torch.where((made > 0) & (read > 0), (read / made).sqrt(), 1.0)


def ranges(program: Program, site: Site) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each channel, [blocks, channels], in what its factor multiplies and what it divides.

    Of matrices and filters only: biases and norms' weights go along.
    """
    sides = {sign: torch.zeros(site.blocks, site.channels) for sign in (1, -1)}
    for use, places, exponents in zip(site.uses, site.positions, site.exponents, strict=True):
        weight = program.tensors[use.tensor]
        if use.axis is None or weight.dim() < 2:
            continue
        largest = weight.movedim(use.axis, 0).flatten(1).abs().amax(1).float()[places]
        for sign, side in sides.items():
            here = torch.where(use.power * exponents == sign, largest, 0.0).amax(1)
            sides[sign] = torch.maximum(side, here)
    return sides[1], sides[-1]
