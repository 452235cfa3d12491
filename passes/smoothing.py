"""Smoothing: the channels that linear layers read, what takes up their factors, and what was measured of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from qcompiler.calibration import Needs, Statistic
from qcompiler.errors import No, PassError
from qcompiler.passes.fuse import readers
from qcompiler.passes.selection import weight_name
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.sites import Kind, Site, find

aten = torch.ops.aten


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

    def scale(self, program: Program, factors: Tensor) -> None:
        """Multiply the channels by factors [blocks, channels], and divide what reads them."""
        self.site.scale(program, factors)


@dataclass(frozen=True)
class Product:
    """Linear layers that read one value whose factors nothing before takes up: a multiplication at run time does."""

    layers: tuple[fx.Node, ...]

    @property
    def places(self) -> Tensor:
        """Where the value holds the channels, int64 [1, 1, channels]: all of it is one block."""
        x = self.layers[0].all_input_nodes[0]
        return torch.arange(x.meta["type"].shape[-1]).view(1, 1, -1)

    def column_ranges(self, program: Program) -> Tensor:
        """The largest magnitude among the weights that read each channel, [1, channels]."""
        return torch.stack([program.weight(node).float().abs().amax(0) for node in self.layers]).amax(0, keepdim=True)

    def scale(self, program: Program, factors: Tensor) -> None:
        """Multiply the value by factors [1, channels], and divide the weights that read it."""
        first, name = self.layers[0], weight_name(self.layers[0])
        x, kind = first.all_input_nodes[0], program.weight(first).dtype
        with program.graph.inserting_before(first):
            stored = program.store(f"{name}.factors", factors[0].to(kind), like=first)
            product = program.call(aten.mul.Tensor, (x, stored), like=first, type=x.meta["type"])
        for node in self.layers:
            tensor = weight_name(node)
            program.tensors[tensor] = (program.tensors[tensor].float() / factors).to(kind)
            node.update_arg(0, product)


STUCK = "no factor can pass to what makes its channels"
Smoothed = TypeVar("Smoothed", bound=Reading | Product)


def readings(program: Program, layers: Sequence[fx.Node], ctx: Context) -> dict[fx.Node, list[Reading]]:
    """The sites that `layers` read, by the first layer that does; a layer that reads none is refused."""
    found = sites_read(program, layers)
    for node in unreached(layers, found):
        ctx.refuse(No(STUCK, weight_name(node)))
    return found


def sites_read(program: Program, layers: Sequence[fx.Node]) -> dict[fx.Node, list[Reading]]:
    """The sites that `layers` read, by the first layer that does."""
    by_name = {weight_name(node): node for node in layers}
    found: dict[fx.Node, list[Reading]] = {}
    for site in find(program, Kind.SCALE):
        places = [i for i, use in enumerate(site.uses) if use.power < 0 and use.tensor in by_name]
        if places:
            nodes = [by_name[site.uses[i].tensor] for i in places]
            alike = [i for i, node in zip(places, nodes, strict=True) if node.args[0] is nodes[0].args[0]]
            found.setdefault(nodes[0], []).append(Reading(site, tuple(places), tuple(alike)))
    return found


def unreached(layers: Sequence[fx.Node], found: Mapping[fx.Node, Sequence[Reading]]) -> list[fx.Node]:
    """Those of `layers` that read the channels of no site."""
    reached = {r.site.uses[i].tensor for several in found.values() for r in several for i in r.readers}
    return [node for node in layers if weight_name(node) not in reached]


def products(program: Program, layers: Sequence[fx.Node]) -> dict[fx.Node, list[Product]]:
    """Layers that read the same value, by the first; those whose weight is read elsewhere too are left out."""
    together: dict[Any, list[fx.Node]] = {}
    for node in layers:
        if len(readers(program, weight_name(node))) == 1:
            together.setdefault(node.args[0], []).append(node)
    return {nodes[0]: [Product(tuple(nodes))] for nodes in together.values()}


def measured(
    program: Program, found: Mapping[fx.Node, Sequence[Smoothed]], statistic: Statistic, ctx: Context
) -> Iterator[tuple[Smoothed, Any]]:
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
