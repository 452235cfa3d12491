"""Smoothing: the scale sites that linear layers read, each with what was measured of its channels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.calibration import Needs, Statistic
from qcompiler.errors import No, PassError
from qcompiler.passes.selection import weight_name
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.sites import Kind, Site, find


@dataclass(frozen=True)
class Reading:
    """A site and the selected linear layers that read its channels; `readers` are their columns, by place in `uses`.

    `alike` are those of them that read the same value as the first; others may read the channels beside more.
    """

    site: Site
    readers: tuple[int, ...]
    alike: tuple[int, ...]

    @property
    def places(self) -> Tensor:
        """Where the first layer's input holds the channels, int64 [blocks, copies, channels]."""
        return self.site.positions[self.readers[0]]

    def weights(self, program: Program, readers: Sequence[int]) -> list[Tensor]:
        """What these readers multiply by, float32 [n, k] each."""
        return [program.tensors[self.site.uses[i].tensor].float() for i in readers]

    def column_ranges(self, program: Program) -> Tensor:
        """The largest magnitude among the weights that read each channel, [blocks, channels]."""
        places = [self.site.positions[i] for i in self.readers]
        pairs = zip(self.weights(program, self.readers), places, strict=True)
        return torch.cat([weight.abs().amax(0)[at] for weight, at in pairs], 1).amax(1)


def readings(program: Program, layers: Sequence[fx.Node], ctx: Context) -> dict[fx.Node, list[Reading]]:
    """The sites that `layers` read, by the first layer that does; a layer that reads none is refused."""
    by_name = {weight_name(node): node for node in layers}
    found: dict[fx.Node, list[Reading]] = {}
    reached: set[str] = set()
    for site in find(program, Kind.SCALE):
        readers = [i for i, use in enumerate(site.uses) if use.power < 0 and use.tensor in by_name]
        if readers:
            nodes = [by_name[site.uses[i].tensor] for i in readers]
            alike = [i for i, node in zip(readers, nodes, strict=True) if node.args[0] is nodes[0].args[0]]
            reached.update(site.uses[i].tensor for i in readers)
            found.setdefault(nodes[0], []).append(Reading(site, tuple(readers), tuple(alike)))
    for name in by_name:
        if name not in reached:
            ctx.refuse(No("no factor can pass to what makes its channels", name))
    return found


def measured(
    program: Program, found: Mapping[fx.Node, Sequence[Reading]], statistic: Statistic, ctx: Context
) -> Iterator[tuple[Reading, Any]]:
    """Each site with the statistic of what its first layer reads, segment by segment; scale it before the next."""
    if not ctx.samples:
        raise PassError("it needs calibration data; give calibration=..., or leave it out of the recipe")

    def needs(nodes: Sequence[fx.Node]) -> Needs:
        return {node.name: statistic for node in nodes if node in found}

    for segment in ctx.sweep(program, needs):
        for node in [n for n in segment.nodes if n in found]:
            ctx.node = node
            seen = segment.statistics[node.name]
            if seen is None:
                ctx.refuse(No("no calibration token reached it", weight_name(node)))
                continue
            yield from ((reading, seen) for reading in found[node])
