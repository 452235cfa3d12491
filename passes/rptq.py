"""RPTQ: reorder-based post-training quantization (Yuan et al., arXiv 2304.01089), the reordering.

Channels of an activation have very different ranges. Those with similar ones are brought next to each other, so that
each group of neighbours can have a scale of its own: a static one, which integer kernels fold into the weights' scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.calibration import Statistic
from qcompiler.errors import No, PassError, RecipeError
from qcompiler.ops import qc
from qcompiler.passes.clusters import cluster
from qcompiler.passes.selection import BODY, layers_of, select
from qcompiler.passes.statistics import MinMax
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rewrite import arguments
from qcompiler.sites import Kind, Site, find

aten = torch.ops.aten
NORMS = ("store", "residual")


@dataclass(frozen=True)
class Rptq(Pass):
    """Reorder channels so that those with similar ranges are neighbours; `activations` and `kv` then round by groups.

    Sites are those of the graph, whatever the architecture: inputs of linear layers, queries with keys, values with the
    attention's output, the MLP's hidden channels (section 4.3). Clusters are K-Means clusters of each channel's minimum
    and maximum (section 4.2), their sizes multiples of `group`, so that weight groups never straddle one; in a head
    there are `head_clusters` at most, multiples of `head_group` (of a rotary head's pairs, two channels each). Each
    value's ranges are divided by its largest before they are clustered: upstream takes them raw, and a query ten times
    its key alone decides the order of both.

    `norms` says how the output of a norm is reordered: `store` (the norm writes each channel to its new place, an order
    for each norm) or `residual` (one order for the residual stream, clustered over all norms, for backends without such
    norms). No gather is added. Where a norm's output goes on as the residual stream (BERT), that is reordered anyway.
    """

    name: ClassVar[str] = "rptq"
    contract: ClassVar[Contract] = Contract.EXACT

    group: int = 32
    clusters: int = 32
    head_group: int = 8
    head_clusters: int = 4
    norms: str = "store"
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()

    @property
    def uses_data(self) -> bool:
        return self.clusters > 0

    def plan(self) -> Pass:
        return replace(self, clusters=0)

    def run(self, program: Program, ctx: Context) -> None:
        """Measure every value that is rounded later, then reorder site by site."""
        if self.norms not in NORMS:
            raise RecipeError(f'norms "{self.norms}" is none of {", ".join(NORMS)}')
        if self.clusters and not ctx.samples:
            raise PassError("it needs calibration data; give calibration=..., or leave rptq out of the recipe")
        layers = select(program, self.include, self.exclude, ctx, layers_of(program))
        if self.norms == "store":
            store_norms(program, layers)
        if not self.clusters:
            return
        watched = watch(program, layers)
        needs = {name: statistic for name, (_, statistic) in watched.items()}
        heads = {value.name for value, statistic in watched.values() if statistic.heads}
        ranges: dict[str, Tensor] = {}
        for segment in ctx.sweep(program, lambda nodes: needs, changes=False):
            ranges |= {watched[name][0].name: seen for name, seen in segment.statistics.items() if seen is not None}
        for site in find(program, Kind.PERMUTE, [value for value, _ in watched.values()]):
            in_head = any(name in heads for name in site.seen)
            count, group = (self.head_clusters, self.head_group) if in_head else (self.clusters, self.group)
            self._reorder(program, site, ranges, count, group, ctx)

    def _reorder(
        self, program: Program, site: Site, ranges: Mapping[str, Tensor], clusters: int, group: int, ctx: Context
    ) -> None:
        values = [name for name in site.seen if name in ranges]
        if not values:
            return
        points = torch.cat([features(ranges[name], site.seen[name]) for name in values], -1)
        index = []
        for block in points:
            order = cluster(block, clusters, group, ctx.seed)
            if isinstance(order, No):
                ctx.refuse(order.at(str(site)))
                return
            index.append(order)
        site.permute(program, torch.stack(index))


def features(ranges: Tensor, places: Tensor) -> Tensor:
    """What channels are clustered by, [blocks, channels, 2 * copies]: minima and maxima [2, elements] at `places`."""
    scale = ranges.abs().max().clamp(min=1e-30)
    return (ranges / scale)[:, places].permute(1, 3, 0, 2).flatten(2)


def watch(program: Program, layers: Sequence[fx.Node]) -> dict[str, tuple[fx.Node, Statistic]]:
    """The values that are rounded later, by the names in `Needs`: what linear layers read, what attention takes."""
    found: dict[str, tuple[fx.Node, Statistic]] = {node.name: (node.all_input_nodes[0], MinMax()) for node in layers}
    for node in program.calls(qc.attention):
        for i, value in enumerate(node.args[:3]):
            assert isinstance(value, fx.Node)
            found[f"{node.name}:{i}"] = value, MinMax(heads=True)
    return found


def store_norms(program: Program, layers: Sequence[fx.Node]) -> None:
    """Let norms that only these linear layers read store their output in an order of its own, at first as it is."""
    for node in program.calls(aten.rms_norm.default, aten.layer_norm.default):
        given = arguments(node)
        weight, bias = given["weight"], given.get("bias")
        stored = all(p is None or p.op == "get_attr" for p in (weight, bias))
        if not stored or len(given["normalized_shape"]) != 1 or not all(user in layers for user in node.users):
            continue
        width = given["normalized_shape"][0]
        kind = "rms" if node.target is aten.rms_norm.default else "layer"
        eps = given["eps"] if given["eps"] is not None else torch.finfo(node.meta["type"].dtype).eps
        with program.graph.inserting_before(node):
            order = program.store(f"{weight.target if weight else node.name}.order", torch.arange(width), like=node)
        program.replace(node, qc.reordered_norm, (node.args[0], weight, bias, order), {"kind": kind, "eps": eps})
