"""activations: what linear layers read is rounded, by grids measured beforehand or by each token's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.axis_convolutions import CONVOLUTIONS
from qcompiler.calibration import Needs, measure
from qcompiler.errors import No, PassError
from qcompiler.ops import qc
from qcompiler.passes.ranges import static_grid, statistic_of
from qcompiler.passes.selection import BODY, convolutions_of, dense, layers_of, select, weight_name
from qcompiler.passes.statistics import Along, Pair, TokenPeaks
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.rounding import activation_scheme
from qcompiler.scheme import Scheme


@dataclass(frozen=True)
class Activations(Pass):
    """Round the inputs of the selected linear layers (`qc.fake_quantize`); layers that share an input share its codes.

    `ranges` says how a static scheme's range is found: `minmax` (all that was seen), `average` (a moving average of
    each sample's), `percentile`, or `error` (least squared error, each channel weighed by the weights that read it).
    Ranges are measured segment by segment on inputs that went through the rounded segments before. Where a token
    exceeds the median one by more than `massive` times, no static range serves both: that activation is rounded by
    each token's own range instead, and the report says so (0: never). Weights may be quantized before or after; gptq
    after this one sees the rounded inputs and makes up for them. With `convolutions` what they read is rounded too,
    and what they make, since integer kernels of convolutions take and give codes.
    """

    name: ClassVar[str] = "activations"
    contract: ClassVar[Contract] = Contract.LOSSY

    scheme: Scheme = Scheme.parse("int8:token:asym:dynamic")
    include: tuple[str, ...] = (BODY,)
    exclude: tuple[str, ...] = ()
    ranges: str = "minmax"
    massive: float = 5.0
    convolutions: bool = False

    @property
    def uses_data(self) -> bool:
        return not self.scheme.dynamic

    def plan(self) -> Pass:
        return replace(self, scheme=Scheme.parse("int8:token:asym:dynamic"))

    def run(self, program: Program, ctx: Context) -> None:
        activation_scheme(str(self.scheme))
        images = dense(convolutions_of(program), ctx) if self.convolutions else []
        chosen = select(program, self.include, self.exclude, ctx, layers_of(program) + images)
        images = [node for node in images if node in chosen]
        for node in [n for n in chosen if n.all_input_nodes[0].target is qc.fake_quantize]:
            ctx.refuse(No("its input is rounded already", weight_name(node)))
            chosen.remove(node)
        done: dict[fx.Node, fx.Node] = {}
        if self.scheme.dynamic:
            for node in chosen:
                self.round_input(program, node, self.scheme, [], done)
        else:
            self._static(program, ctx, chosen, done)
        if images and not self.scheme.dynamic:
            self._results(program, ctx, images)
        ctx.note(f"{len(done)} activations, read by {len(chosen)} linear layers, are rounded to {self.scheme}")

    def _static(self, program: Program, ctx: Context, chosen: Sequence[fx.Node], done: dict[fx.Node, fx.Node]) -> None:
        if not ctx.samples:
            raise PassError(f"ranges of {self.scheme} need calibration data; give some, or take a dynamic scheme")
        names = {node.name for node in chosen}
        statistic = Pair(statistic_of(self.ranges), TokenPeaks())
        by_channel = Along(statistic)

        def needs(nodes: Sequence[fx.Node]) -> Needs:
            return {n.name: by_channel if n.target in CONVOLUTIONS else statistic for n in nodes if n.name in names}

        for segment in ctx.sweep(program, needs):
            readers: dict[fx.Node, list[fx.Node]] = {}
            for node in [n for n in segment.nodes if n.name in segment.statistics]:
                readers.setdefault(node.all_input_nodes[0], []).append(node)
            for nodes in readers.values():
                ctx.node = nodes[0]
                seen, excess = segment.statistics[nodes[0].name]
                if seen is None:
                    ctx.refuse(No("no calibration token reached it", weight_name(nodes[0])))
                    continue
                image = nodes[0].target in CONVOLUTIONS
                scheme = self.scheme if image else self._scheme_for(excess, weight_name(nodes[0]), ctx)
                grid = []
                if not scheme.dynamic:
                    grid = static_grid(seen, scheme, self.ranges, importance=_importance(program, nodes))
                for node in nodes:
                    self.round_input(program, node, scheme, grid, done)

    def _results(self, program: Program, ctx: Context, images: Sequence[fx.Node]) -> None:
        """Round what convolutions (and a relu that follows) make, unless all that read it round it already."""
        made = [result_of(node) for node in images]
        open_ends = [n for n in made if any(user.target is not qc.fake_quantize for user in n.users)]
        asked = {place: node for node in open_ends if (place := _measured_at(node))}
        for node in set(open_ends) - set(asked.values()):
            ctx.refuse(No("nothing reads the result of the convolution where it could be measured", node.name))
        needs = dict.fromkeys(asked, Along(statistic_of(self.ranges)))
        for place, seen in measure(program, ctx.samples, needs, ctx.progress).items():
            node = asked[place]
            grid = static_grid(seen, self.scheme, self.ranges)
            with program.graph.inserting_before(node.next):
                codes = rounding(program, node, f"{node.name}.output", grid, self.scheme)
            for user in [user for user in node.users if user is not codes]:
                user.replace_input_with(node, codes)

    def _scheme_for(self, excess: float, name: str, ctx: Context) -> Scheme:
        """The static scheme, or its dynamic twin where there are massive activations."""
        if not self.massive or excess <= self.massive:
            return self.scheme
        coarse = self.scheme.granularity in ("tensor", "channel")
        twin = replace(self.scheme, dynamic=True, granularity="token" if coarse else self.scheme.granularity)
        ctx.refuse(No(f"a token is {excess:.0f} times the median one, no static range serves both: {twin}", name))
        return twin

    def round_input(
        self, program: Program, node: fx.Node, scheme: Scheme, grid: Sequence[Tensor], done: dict[fx.Node, fx.Node]
    ) -> None:
        """Let a linear layer read its input rounded to `grid`; `done` holds what was rounded already."""
        x = node.all_input_nodes[0]
        if x not in done:
            with program.graph.inserting_before(node):
                done[x] = rounding(program, x, f"{weight_name(node)}.input", grid, scheme, like=node)
        node.update_arg(0, done[x])


def rounding(
    program: Program, x: fx.Node, name: str, grid: Sequence[Tensor], scheme: Scheme, like: fx.Node | None = None
) -> fx.Node:
    """x rounded to a grid that is stored under `name`, at the insertion point."""
    origin = x if like is None else like
    pairs = zip(("scale", "zero"), grid, strict=False)
    stored = [program.store(f"{name}_{part}", value, like=origin) for part, value in pairs]
    how = {"scheme": str(scheme)}
    return program.call(qc.fake_quantize, (x, stored), how, like=origin, type=x.meta["type"])


def result_of(node: fx.Node) -> fx.Node:
    """What a convolution makes: the relu that alone reads it, or itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is torch.ops.aten.relu.default else node


def _measured_at(value: fx.Node) -> str:
    """The name by which a statistic of `value` is asked for: one of an argument of a node that reads it; "" if none."""
    for user in value.users:
        for i, argument in enumerate(user.args if user.op == "call_function" else ()):
            if argument is value:
                return f"{user.name}:{i}"
    return ""


def _importance(program: Program, readers: Sequence[fx.Node]) -> Tensor:
    """How much an error of each channel weighs: the squared norm of the columns, or filters, that read it."""
    squares = [program.weight(node).float().pow(2).transpose(0, 1).flatten(1).sum(1) for node in readers]
    return torch.stack(squares).sum(0)
