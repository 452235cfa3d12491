"""Caches of fixed size, and a decoding step over them: what a CUDA graph can hold.

The step is the program for one new token, its attention over growing caches replaced by attention over what stands in
the fixed ones. It takes ids [batch, 1], positions [batch, 1], places int32 [batch], and all caches' tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompiler.errors import No
from qcompiler.kernels import kv_append
from qcompiler.kernels.kv_append import QuantizedCache
from qcompiler.kernels.operators import qct
from qcompiler.kernels.records import split
from qcompiler.ops import qc
from qcompiler.program import Input, Program, Type
from qcompiler.rewrite import named_arguments
from qcompiler.scheme import Scheme
from qcompiler.target import Answer

PLAIN = ("mask", "bias", "sinks", "key_grid", "value_grid")  # of an attention: what a fixed step cannot have


@dataclass(frozen=True)
class Caches:
    """Keys and values of every layer, for `batch` sequences of at most `capacity` tokens.

    `parts` names each program cache with its record (None: a float tensor) and its place among `tensors`.
    """

    batch: int
    capacity: int
    parts: dict[str, tuple[QuantizedCache | None, slice]]
    tensors: list[Tensor]

    @classmethod
    def empty(cls, program: Program, batch: int, capacity: int, device: torch.device) -> "Caches":
        """Room for what the program's caches hold."""
        parts, tensors = {}, list[Tensor]()
        for name, scheme in schemes_of(program).items():
            kind = next(i.type for i in program.caches if i.name == name)
            heads, width = kind.shape[1], kind.shape[3]
            assert isinstance(heads, int)
            assert isinstance(width, int)
            record, mine = None, [torch.zeros(batch, heads, capacity, width, dtype=kind.dtype, device=device)]
            if scheme:
                record = QuantizedCache.empty(scheme, batch, heads, capacity, width, device)
                mine = split(record)[0]
            parts[name] = (record, slice(len(tensors), len(tensors) + len(mine)))
            tensors += mine
        return cls(batch, capacity, parts, tensors)

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take over caches [batch, heads, length, d] as the program made them."""
        places = torch.zeros(self.batch, dtype=torch.int32, device=self.tensors[0].device)
        for name, (record, where) in self.parts.items():
            if record is None:
                self.tensors[where.start][:, :, : state[name].shape[2]] = state[name]
            else:
                kv_append.kv_append(state[name].contiguous(), record, places)


def schemes_of(program: Program) -> dict[str, str]:
    """What rounds each of the program's caches, by name; "" for nothing."""
    found = dict[str, str]()
    for node in program.calls(qc.cached_attention):
        given = named_arguments(node)
        found |= {str(given[f"past_{part[0]}"].target): given[part] or "" for part in ("key", "value")}
    return {i.name: found[i.name] for i in program.caches}


def fixed_step(program: Program) -> Program | No:
    """The program for one new token over fixed caches, or why there is none."""
    answer = steady(program)
    if isinstance(answer, No):
        return answer
    step = program.copy()
    schemes = schemes_of(step)
    old = {str(node.target): node for node in step.placeholders}
    with step.graph.inserting_before(step.placeholders[0]):
        new = {spec.name: _placeholder(step, spec) for spec in _inputs(program, schemes)}
    for name in ("input_ids", "position_ids"):
        if name in old:
            old[name].replace_all_uses_with(new[name])
    for node in step.calls(qc.cached_attention):
        _attend(step, node, new, schemes)
    _drop_selection(old.get("logits_positions"))
    step.output_node.args = ([step.output_node.args[0][program.outputs.index("logits")]],)  # type: ignore[index]
    step.inputs, step.outputs, step.info = tuple(_inputs(program, schemes)), ("logits",), {}
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
    given = named_arguments(node)
    if present := [name for name in PLAIN if given[name] is not None]:
        return No(f"its attention has a {present[0].replace('_', ' ')}")
    if wanted := [name for name in ("chunk", "softcap", "block", "recent", "first", "levels") if given[name]]:
        return No(f"its attention asks for {wanted[0]}={given[wanted[0]]}")
    if not given["key"] and not given["value"]:
        return True
    if not given["key"] or not given["value"]:
        return No("only one of keys and values is rounded")
    for name in ("key", "value"):
        answer = kv_append.accepts(given[name])
        if isinstance(answer, No):
            return answer
    if Scheme.parse(given["key"]).bits != Scheme.parse(given["value"]).bits:
        return No(f"keys of {given['key']} beside values of {given['value']}: the kernel takes one width")
    width = given["k"].meta["type"].shape[-1]
    return (width >= 64 and width & (width - 1) == 0) or No(f"heads of {width} channels, not 64, 128 or 256")


def _inputs(program: Program, schemes: Mapping[str, str]) -> Iterator[Input]:
    """What the step takes: ids, positions, places, and every cache's tensors."""
    yield Input("input_ids", Type(("batch", 1), torch.int64))
    yield Input("position_ids", Type(("batch", 1), torch.int64))
    yield Input("places", Type(("batch",), torch.int32))
    for cache in program.caches:
        _, heads, _, width = cache.type.shape
        if not schemes[cache.name]:
            yield Input(cache.name, Type(("batch", heads, "capacity", width), cache.type.dtype))
            continue
        words = Scheme.parse(schemes[cache.name]).bits * int(width) // 16
        yield Input(f"{cache.name}_words", Type(("batch", heads, "capacity", words), torch.int16))
        yield Input(f"{cache.name}_grids", Type(("batch", heads, "capacity"), torch.int32))


def _placeholder(program: Program, spec: Input) -> fx.Node:
    node = program.graph.placeholder(spec.name)
    node.meta["type"] = spec.type
    return node


def _attend(step: Program, node: fx.Node, new: Mapping[str, fx.Node], schemes: Mapping[str, str]) -> None:
    """Put `qct.attend` in the place of an attention over growing caches."""
    given = named_arguments(node)
    caches, specs = [], []
    for part in ("key", "value"):
        name = str(given[f"past_{part[0]}"].target)
        scheme = schemes[name]
        caches.append([new[f"{name}_words"], new[f"{name}_grids"]] if scheme else [new[name]])
        specs.append(split(QuantizedCache.empty(scheme, 1, 1, 1, 64))[1] if scheme else "")
    kwargs = {"key_spec": specs[0], "value_spec": specs[1], "scale": given["scale"], "left": given["left"]}
    args = (given["q"], given["k"], given["v"], *caches, new["places"])
    with step.graph.inserting_before(node):
        attended = step.call(qct.attend, args, kwargs, like=node, type=node.meta["type"][0])
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(attended)


def _drop_selection(positions: fx.Node | None) -> None:
    """With one new token there is nothing to choose from."""
    for node in list(positions.users) if positions is not None else []:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
