"""A decoding step over caches of fixed size: what a CUDA graph can hold.

It is the program for one new token, its attention over growing caches replaced by attention over what stands in the
fixed ones. It takes ids [batch, 1], positions [batch, 1], places int32 [batch], and all tensors of `Caches`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qcompiler.backends.triton.caches import Held
from qcompiler.errors import No
from qcompiler.kernels import kv_cache
from qcompiler.kernels.operators import qct
from qcompiler.kernels.records import split_all
from qcompiler.ops import qc
from qcompiler.program import Input, Program, Type
from qcompiler.rewrite import named_arguments
from qcompiler.target import Answer

PLAIN = ("mask", "bias", "sinks", "key_grid", "value_grid")  # of an attention: what a fixed step cannot have
SAMPLE = 128  # tokens of caches that are made only to see how many tensors they have


def fixed_step(program: Program) -> Program | No:
    """The program for one new token over fixed caches, or why there is none."""
    answer = steady(program)
    if isinstance(answer, No):
        return answer
    step = program.copy()
    old = {str(node.target): node for node in step.placeholders}
    ids = Type(("batch", 1), torch.int64)
    inputs = [Input("input_ids", ids), Input("position_ids", ids), Input("places", Type(("batch",), torch.int32))]
    start = step.placeholders[0]
    new = {spec.name: _placeholder(step, spec, start) for spec in inputs}
    for name in ("input_ids", "position_ids"):
        if name in old:
            old[name].replace_all_uses_with(new[name])
    for layer, node in enumerate(step.calls(qc.cached_attention)):
        tensors, spec = split_all(Held.of(node).records(1, SAMPLE, torch.device("meta")))
        mine = [Input(f"cache_{layer}_{i}", _type(part)) for i, part in enumerate(tensors)]
        _attend(step, node, [_placeholder(step, one, start) for one in mine], new["places"], spec)
        inputs += mine
    _drop_selection(old.get("logits_positions"))
    step.output_node.args = ([step.output_node.args[0][program.outputs.index("logits")]],)  # type: ignore[index]
    step.inputs, step.outputs, step.info = tuple(inputs), ("logits",), {}
    step.clean()
    for node in old.values():
        step.graph.erase_node(node)
    return step


def steady(program: Program) -> Answer:
    """Whether one step can be the same for every token, with what kernels and masks of fixed size can do."""
    known = {"input_ids", "attention_mask", "position_ids", "logits_positions", *(i.name for i in program.caches)}
    if other := [i.name for i in program.inputs if i.name not in known]:
        return No(f'the program has an input "{other[0]}" of its own')
    for node in program.placeholders:
        if node.target == "attention_mask" and any(user.target is not qc.cached_attention for user in node.users):
            return No("the program computes with its attention mask")
    for node in program.calls(qc.cached_attention):
        answer = _fits(node)
        if isinstance(answer, No):
            return answer.at(str(node.meta.get("path", node.name)))
    return True


def _fits(node: fx.Node) -> Answer:
    """Whether an attention can be done over fixed caches."""
    given, held = named_arguments(node), Held.of(node)
    if present := [name for name in PLAIN if given[name] is not None]:
        return No(f"its attention has a {present[0].replace('_', ' ')}")
    if wanted := [name for name in ("chunk", "softcap", "levels") if given[name]]:
        return No(f"its attention asks for {wanted[0]}={given[wanted[0]]}")
    if not held.key_scheme and not held.value_scheme:
        return True
    if not held.key_scheme or not held.value_scheme or held.width != held.value_width:
        return No("keys and values are not rounded alike")
    if held.windowed and given["left"] >= 0:
        return No("tokens keep their floats, and its attention has a sliding window")
    return kv_cache.suits(held.key_scheme, held.value_scheme, held.width, held.block)


def _type(part: Any) -> Type:
    """Of a cache's tensor, whose first axis is the batch, and whose third grows with the tokens."""
    _, heads, _, *rest = part.shape
    return Type(("batch", heads, "capacity", *rest), part.dtype)


def _placeholder(program: Program, spec: Input, before: fx.Node) -> fx.Node:
    with program.graph.inserting_before(before):
        node = program.graph.placeholder(spec.name)
    node.meta["type"] = spec.type
    return node


def _attend(step: Program, node: fx.Node, caches: Sequence[fx.Node], places: fx.Node, spec: str) -> None:
    """Put `qct.attend` in the place of an attention over growing caches."""
    given = named_arguments(node)
    args = (given["q"], given["k"], given["v"], list(caches), places)
    kwargs = {"spec": spec, "scale": given["scale"], "left": given["left"]}
    with step.graph.inserting_before(node):
        attended = step.call(qct.attend, args, kwargs, like=node, type=node.meta["type"][0])
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(attended)


def _drop_selection(positions: fx.Node | None) -> None:
    """With one new token there is nothing to choose from."""
    for node in list(positions.users) if positions is not None else []:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
