"""What whole groups cost: the same static rounding by K-Means clusters of any size, wherever their channels are.

As many clusters as the groups they are compared with (32 channels of an activation, 8 of a head). No kernel could run
it: each channel carries its cluster's scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.calibration import Needs
from qcompiler.ops import qc
from qcompiler.passes.activations import Activations
from qcompiler.passes.kv import KEY, VALUE, Kv, heads_of
from qcompiler.passes.rptq import features
from qcompiler.passes.selection import BODY, layers_of, select
from qcompiler.passes.statistics import MinMax
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rounding import grid_of
from qcompiler.scheme import Scheme

GROUP, HEAD_GROUP = 32, 8


@dataclass(frozen=True)
class FreeClusters(Pass):
    """Static asymmetric rounding of what linear layers read (`normed` and `other` bits) and of attention (`heads`).

    0 bits leave it in float; `queries` rounds queries and attention weights too.
    """

    name: ClassVar[str] = "free"
    contract: ClassVar[Contract] = Contract.LOSSY

    normed: int = 0
    other: int = 0
    heads: int = 0
    queries: bool = False

    def run(self, program: Program, ctx: Context) -> None:
        body = select(program, (BODY,), (), ctx, layers_of(program)) if self.other else []
        normed = set(select(program, ("@normed",), (), ctx, layers_of(program))) if self.other else set()
        places = ((0,) if self.queries else ()) + ((KEY, VALUE) if self.heads else ())

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            heads = {f"{n.name}:{i}": MinMax(heads=True) for n in nodes if n.target is qc.attention for i in places}
            return {node.name: MinMax() for node in nodes if node in body} | heads

        done: dict[fx.Node, fx.Node] = {}
        for segment in ctx.sweep(program, needs):
            for node in [n for n in segment.nodes if n.name in segment.statistics]:
                scheme = Scheme.parse(f"int{self.normed if node in normed else self.other}:channel:asym")
                grid = clustered(segment.statistics[node.name], GROUP, scheme)
                Activations(scheme).round_input(program, node, scheme, grid, done)
            for node in [n for n in segment.nodes if n.target is qc.attention and places]:
                self._round_heads(program, node, {i: segment.statistics[f"{node.name}:{i}"] for i in places}, ctx)

    def _round_heads(self, program: Program, node: fx.Node, seen: dict[int, Tensor], ctx: Context) -> None:
        scheme = Scheme.parse(f"int{self.heads}:channel:asym")
        query: dict[str, Any] = {"query": scheme, "levels": 255} if self.queries else {}
        grids = {i: _by_head(ranges, heads_of(node, i), scheme) for i, ranges in seen.items()}
        Kv(scheme, scheme, **query).round_attention(program, node, grids, ctx)


def clustered(seen: Tensor, group: int, scheme: Scheme) -> list[Tensor]:
    """The grid of each channel's cluster: scale and zero point [channels], from minima and maxima [2, channels]."""
    from sklearn.cluster import KMeans

    channels = seen.shape[1]
    points = features(seen, torch.arange(channels)[None, None])[0]
    labels = torch.from_numpy(KMeans(channels // group, n_init=4, random_state=0).fit_predict(points)).long()
    low = seen.new_zeros(channels // group).scatter_reduce(0, labels, seen[0], "amin")[labels]
    high = seen.new_zeros(channels // group).scatter_reduce(0, labels, seen[1], "amax")[labels]
    return [part for part in grid_of(low, high, scheme) if part is not None]


def _by_head(seen: Tensor, heads: int, scheme: Scheme) -> list[Tensor]:
    """The same for each head alone: [heads, 1, channels of a head]."""
    grids = [clustered(part, HEAD_GROUP, scheme) for part in seen.unflatten(-1, (heads, -1)).unbind(1)]
    return [torch.stack(parts)[:, None] for parts in zip(*grids, strict=True)]
