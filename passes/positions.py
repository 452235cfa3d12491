"""Which operations look across the positions of a sequence: what decides whether a program can go on from a cache."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.program import Program, Type
from qcompiler.rewrite import named_arguments

Answer = bool | No
Check = Callable[[fx.Node], Answer]


def may_cache(program: Program, attentions: Sequence[fx.Node]) -> Answer:
    """True if every operation but attention acts on each position alone, or a No that names the one that does not."""
    if not attentions:
        return No("it has no attention that was recognized")
    counted = from_mask(program)
    if all(spec.name != "position_ids" for spec in program.inputs) and len(counted) < 2:
        return No("it takes no position_ids, so that positions would be counted from zero in each step")
    if "logits" not in program.outputs:
        return No(f"it gives no logits, only {list(program.outputs)}")
    for node in program.graph.nodes:
        if node in counted and node.op == "call_function":
            continue
        answer = cacheable(node) if node.target == qc.attention else position_wise(node, counted)
        if isinstance(answer, No):
            return answer.at(f'node "{node.name}" ({node.meta.get("path", "")})')
    return True


def cacheable(node: fx.Node) -> Answer:
    """Whether an attention is causal and depends on positions through its window and padding only."""
    given = named_arguments(node)
    if given["right"] != 0:
        return No("its attention is not causal")
    if isinstance(given["mask"], fx.Node):
        return No("its attention takes a mask that was not recognized")
    for name in ("bias", "sinks"):
        if along(given[name]):
            return No(f"its attention takes a {name} that depends on the length of the sequence")
    padding = given["padding"]
    if isinstance(padding, fx.Node) and padding.op != "placeholder":
        return No("its attention takes a padding mask that is computed, not given")
    return True


def from_mask(program: Program) -> set[fx.Node]:
    """The attention mask and the values [batch, sequence] made of it alone, such as positions counted from it.

    They may look across positions: the mask of past and new positions is always given whole.
    """
    found = {node for node in program.placeholders if node.target == "attention_mask"}
    for node in program.calls():
        kind = node.meta.get("type")
        shaped = isinstance(kind, Type) and kind.rank == 2 and along(node) == [1]
        if shaped and node.all_input_nodes and all(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def position_wise(node: fx.Node, counted: Collection[fx.Node] = ()) -> Answer:
    """True if position i of the result needs position i of the arguments only; `counted` are made of the mask."""
    if node.op == "placeholder" and node.target == "attention_mask":
        known = (*counted, qc.attention)
        others = [u for u in node.users if u not in known and u.target not in known and not is_size(u)]
        return No(f'the attention mask is also used by "{others[0].name}"') if others else True
    if node.op != "call_function" or is_size(node):
        return True
    if len(along(node)) > 1:
        return No("it relates positions to positions")
    name = operator_name(node)
    if name in COUNTERS and any(is_length(argument) for argument in node.all_input_nodes):
        return No("it counts positions by itself, not from position_ids")
    if not any(along(argument) for argument in node.all_input_nodes):
        return True
    return MIXERS[name](node) if name in MIXERS else True


def operator_name(node: fx.Node) -> str:
    """An operator's name without its overload, such as `aten.cumsum`."""
    return str(getattr(node.target, "overloadpacket", node.target))


def along(value: Any) -> list[int]:
    """The axes of a value that run along the sequence; none for anything but a node that stands for a tensor."""
    kind = type_of(value)
    if kind is None:
        return []
    return [axis for axis, size in enumerate(kind.shape) if isinstance(size, str) and "sequence" in size]


def type_of(value: Any) -> Type | None:
    """The type of a value, or of its first part; None for a number."""
    kind = value.meta.get("type") if isinstance(value, fx.Node) else None
    first = kind[0] if isinstance(kind, tuple) else kind
    return first if isinstance(first, Type) else None


def is_size(node: fx.Node) -> bool:
    """Whether a node stands for a number, such as a size."""
    return node.meta.get("type") is None


def is_length(node: fx.Node) -> bool:
    """Whether a node stands for a number that depends on the length of the sequence."""
    if not is_size(node):
        return False
    if operator_name(node) == "aten.sym_size":
        return node.args[1] in along(node.args[0])
    return any(is_length(argument) for argument in node.all_input_nodes)


# -- what each operation mixes ---------------------------------------------------------------------------------


def touches(node: fx.Node, value: Any, axes: Sequence[int]) -> Answer:
    """No if one of `axes` of `value` runs along the sequence."""
    kind = type_of(value)
    if kind is None or not any(axis % kind.rank in along(value) for axis in axes):
        return True
    return No(f"{operator_name(node)} works along the sequence")


def over(argument: str) -> Check:
    """Mixes along the axes given as `argument`; along all axes if none is given."""

    def check(node: fx.Node) -> Answer:
        given = named_arguments(node)
        value = next(iter(given.values()))
        if isinstance(value, (list, tuple)):  # cat: the sequence may be missing from some of its parts
            value = next(part for part in value if along(part))
        axes = given.get(argument)
        if axes is None or axes == []:
            axes = along(value)
        return touches(node, value, axes if isinstance(axes, (list, tuple)) else [axes])

    return check


def trailing(count: int) -> Check:
    """Mixes the last `count` axes of the first argument."""
    return lambda node: touches(node, node.args[0], range(-count, 0))


def normalization(node: fx.Node) -> Answer:
    """Mixes the axes of its shape argument."""
    shape = node.args[1]
    assert isinstance(shape, (list, tuple))
    return trailing(len(shape))(node)


def contraction(node: fx.Node) -> Answer:
    """Mixes the last axis of the left and the last but one of the right."""
    answer = touches(node, node.args[0], [-1])
    kind = type_of(node.args[1])
    return touches(node, node.args[1], [-2]) if answer and kind is not None and kind.rank > 1 else answer


def convolution(node: fx.Node) -> Answer:
    """Mixes the axes after the batch."""
    kind = type_of(node.args[0])
    return touches(node, node.args[0], range(1, kind.rank if kind else 1))


def padding(node: fx.Node) -> Answer:
    """Shifts the axes whose width is not zero."""
    widths = node.args[1]
    assert isinstance(widths, (list, tuple))
    return touches(node, node.args[0], [-1 - i // 2 for i, width in enumerate(widths) if width != 0])


def slicing(node: fx.Node) -> Answer:
    """Picks positions, unless it takes all."""
    given = named_arguments(node)
    everything = given["start"] in (None, 0) and given["end"] in (None, 2**63 - 1) and given["step"] == 1
    return True if everything else touches(node, node.args[0], [given["dim"]])


# An operation that is not listed acts on every element, or on every row of a table, alone. The pipeline checks the
# outcome on data: a program with caches must give the same logits in one piece and in several.
MIXERS: dict[str, Check] = {
    **{
        f"aten.{name}": over("dim")
        for name in [
            "softmax",
            "_softmax",
            "log_softmax",
            "_log_softmax",
            "logsumexp",
            "cumsum",
            "cumprod",
            "cummax",
            "cummin",
            "logcumsumexp",
            "sum",
            "mean",
            "prod",
            "amax",
            "amin",
            "max",
            "min",
            "std",
            "var",
            "var_mean",
            "any",
            "all",
            "argmax",
            "argmin",
            "norm",
            "linalg_vector_norm",
            "sort",
            "topk",
            "select",
            "index_select",
            "narrow",
            "split",
            "split_with_sizes",
            "chunk",
            "unbind",
            "cat",
            "stack",
            "diff",
            "glu",
        ]
    },
    **{f"aten.{name}": over("dims") for name in ("flip", "roll")},
    **{f"aten._fft_{name}": over("dim") for name in ("r2c", "c2c", "c2r")},
    **{f"aten.{name}": normalization for name in ("layer_norm", "rms_norm", "native_layer_norm")},
    **{f"aten.{name}": contraction for name in ("matmul", "mm", "bmm")},
    **{f"aten.{name}": convolution for name in ("conv1d", "conv2d", "convolution", "conv_transpose1d", "unfold")},
    **{f"aten.{name}": padding for name in ("constant_pad_nd", "pad")},
    **{f"aten.{name}": trailing(2) for name in ("triu", "tril", "scaled_dot_product_attention")},
    "aten.linear": trailing(1),
    "qc.linear": trailing(1),
    "qc.attention": trailing(3),
    "aten.slice": slicing,
}
# What makes numbers of a length.
COUNTERS = {"aten.arange", "aten.scalar_tensor", "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.pow"}


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator works element by element."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())
