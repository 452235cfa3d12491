"""What gptq knows of a layer's inputs beyond the plain Hessian: tokens that count for more, and how far inputs drifted.

Tokens are weighed (after RSQ, Sung et al., arXiv 2503.01820) so that the layer's error is ||(WX - QX) R||^2, by what
`importance` names:

- `relative`: by the inverse square of a token's size where its block ends. The norms behind it divide by that size, so
  what a layer does wrong to a massive first token (arXiv 2402.17762) counts no more than what it does to any other.
- `attention`: by the attention that a token receives in its block, RSQ's choice.

The drift is what the float model has in the place of the inputs X: X~ - X, correlated with X (GPTAQ, Li et al.,
arXiv 2504.02692).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler import calibration
from qcompiler.calibration import Needs, Sample, Segment, real_rows
from qcompiler.execution import execute
from qcompiler.ops import qc
from qcompiler.passes.reference import outputs, unrounded
from qcompiler.passes.statistics import Hessian
from qcompiler.pipeline import Context
from qcompiler.program import Program

Values = dict[fx.Node, Any]
Mean = tuple[int, Tensor | None]  # of how many tokens, and it


@dataclass(frozen=True)
class Side:
    """A program, and the segment of it that a sweep has reached."""

    program: Program
    segment: Segment

    def run(self, i: int, wanted: Iterable[fx.Node]) -> Values:
        """The values of `wanted` nodes for sample i."""
        wanted, env = set(wanted), self.segment.inputs[i]
        found = {node: env[node] for node in wanted if node in env}
        found |= {node: self.program.tensors[str(node.target)] for node in wanted if node.op == "get_attr"}

        def keep(node: fx.Node, value: Any) -> None:
            if node in wanted:
                found[node] = value

        execute(self.segment.nodes, env, self.program.tensors, keep)
        return found


def side_by_side(
    program: Program, needs: Callable[[Sequence[fx.Node]], Needs], ctx: Context, both: bool
) -> Iterator[tuple[Segment, Side | None]]:
    """The segments of a program that changes, with `both` each beside the float model's."""
    segments = ctx.sweep(program, needs)
    if not both:
        yield from ((segment, None) for segment in segments)
        return
    floats = unrounded(program).decoded()
    twins = calibration.sweep(floats, ctx.samples, lambda nodes: {})
    yield from ((segment, Side(floats, twin)) for segment, twin in zip(segments, twins, strict=True))


@torch.no_grad()
def measure(
    side: Side, floats: Side | None, samples: Sequence[Sample], chosen: Sequence[fx.Node], importance: str
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The weighed Hessian of each chosen layer's inputs, and their drift from the float model's, both by its name.

    Layers with one input share their tensors. Drifts are float32 [k, k]: the weighed mean of (x~ - x) x'.
    """
    sources = {node.name: source_of(node) for node in chosen}
    hessians = dict.fromkeys(sources.values(), Hessian().start())
    drifts: dict[fx.Node, Mean] = dict.fromkeys(sources.values(), (0, None))
    twins = {node.name: source_of(node) for node in floats.segment.nodes if node.name in sources} if floats else {}
    pairs = {sources[name]: twin for name, twin in twins.items()}
    asked, weigh = IMPORTANCE[importance](side.segment)
    for i, sample in enumerate(samples):
        values = side.run(i, [*sources.values(), *asked])
        exact = floats.run(i, pairs.values()) if floats else {}
        weights = weigh(values)
        for source in hessians:
            x = values[source]
            root = torch.ones(x.shape[:-1])
            if weights is not None and weights.numel() == root.numel():  # some layers read some tokens only: experts
                root = weights.sqrt().reshape(root.shape)
            rows = real_rows(x * root[..., None], sample)
            hessians[source] = Hessian().step(hessians[source], rows)
            if source in pairs:
                shift = real_rows((exact[pairs[source]] - x) * root[..., None], sample)
                drifts[source] = product_mean(drifts[source], shift, rows)
    done = {source: Hessian().done(state) for source, state in hessians.items()}
    found = {name: done[source] for name, source in sources.items()}
    return found, {name: drift for name in sources if (drift := drifts[sources[name]][1]) is not None}


def product_mean(state: Mean, y: Tensor, x: Tensor) -> Mean:
    """The mean of y x' over tokens, float32 [channels, channels], after more rows y and x [tokens, channels]."""
    count, mean = state
    total = count + x.shape[0]
    mean = torch.zeros(x.shape[1], x.shape[1]) if mean is None else mean.mul_(count / total)
    return total, mean.addmm_(y.float().T, x.float(), alpha=1 / total)


def source_of(node: fx.Node) -> fx.Node:
    """The node whose value a linear layer reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


# An importance: the nodes whose values it asks for, and the weights [batch, tokens] that it gives; None: all the same.
Weighing = tuple[Sequence[fx.Node], Callable[[Values], Tensor | None]]


def _all_the_same(segment: Segment) -> Weighing:
    return (), lambda values: None


def _relative(segment: Segment) -> Weighing:
    ends = [node for node in outputs(segment.nodes) if len(node.meta["type"].shape) == 3]

    def weigh(values: Values) -> Tensor | None:
        sizes = [values[node].float().square().mean(-1) for node in ends]
        return 1 / torch.stack(sizes).sum(0).clamp(min=1e-12) if sizes else None

    return ends, weigh


def _attention(segment: Segment) -> Weighing:
    attentions = [node for node in segment.nodes if node.target is qc.attention]
    asked = [node for attention in attentions for node in attention.all_input_nodes]

    def weigh(values: Values) -> Tensor | None:
        received = [_received(node, values) for node in attentions]
        return torch.stack(received).sum(0) if received else None

    return asked, weigh


def _received(node: fx.Node, values: Values) -> Tensor:
    """The attention that each token gets from all heads and queries, [batch, tokens]."""
    arguments: Any = fx.node.map_arg(node.args, lambda argument: values[argument])
    q, k, _, *rest = arguments
    each = torch.eye(k.shape[2], dtype=q.dtype).expand(k.shape[0], k.shape[1], -1, -1)  # a value for each key
    kwargs = {name: value for name, value in node.kwargs.items() if name not in ("value", "value_grid")}
    weights: Tensor = qc.attention(q, k, each, *rest, **kwargs)
    return weights.sum(dim=(1, 2))


IMPORTANCE: dict[str, Callable[[Segment], Weighing]] = {
    "": _all_the_same,
    "relative": _relative,
    "attention": _attention,
}
