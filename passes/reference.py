"""The program that a quantized one is compared with: the same with its floats, and what a segment of it hands on."""

from collections.abc import Iterator, Sequence

from torch import Tensor, fx

from qcompiler.calibration import Sample
from qcompiler.ops import qc
from qcompiler.program import Program, Type

ROUNDED = ("key", "value", "block", "recent", "first", "levels", "key_grid", "value_grid")  # of qc.attention


def outputs(nodes: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """The float values that later segments read."""
    inside = set(nodes)
    for node in nodes:
        kind = node.meta["type"]
        if isinstance(kind, Type) and kind.dtype.is_floating_point and any(user not in inside for user in node.users):
            yield node


def unrounded(program: Program) -> Program:
    """A copy whose activations, keys and values keep their floats."""
    copy = program.copy()
    for node in copy.calls(qc.fake_quantize, qc.attention):
        if node.target is qc.attention:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ROUNDED}
        else:
            node.replace_all_uses_with(node.all_input_nodes[0])
            copy.graph.erase_node(node)
    return copy


def relative_error(found: Tensor, wanted: Tensor, sample: Sample) -> Tensor:
    """The mean squared error relative to each token's energy."""
    wanted = wanted.float()
    lost = (found.float() - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1).clamp(min=1e-12)
    return over_tokens(lost, sample)


def over_tokens(values: Tensor, sample: Sample) -> Tensor:
    """The mean of [batch, sequence] over the tokens that are no padding."""
    real = sample.get("attention_mask")
    return (values[real != 0] if real is not None and real.shape == values.shape else values).mean()
