"""kv_cache: a causal language model remembers the keys and values of the positions it has seen."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.passes.positions import along, from_mask, is_pointwise, is_size, may_cache
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Input, Program, Type
from qcompiler.rewrite import named_arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class KvCache(Pass):
    """Turn each causal attention into `qc.cached_attention` over explicit cache state.

    Adds inputs `past_key_<i>`, `past_value_<i>` [batch, kv_heads, past, d], outputs `present_key_<i>`,
    `present_value_<i>`, and an input `logits_positions` [kept]: the new positions whose logits are wanted.
    Prefill and decode are then the same program.

    A program in which another operation than attention looks across positions could not go on from caches alone:
    it is refused, and stays as it is.
    """

    name: ClassVar[str] = "kv_cache"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite the program; a program that has caches already is left alone."""
        if program.caches:
            return
        attentions = list(program.calls(qc.attention))
        answer = may_cache(program, attentions)
        if isinstance(answer, No):
            ctx.refuse(No(f"the model cannot continue from a cache: {answer.reason}", answer.where))
            return
        cut_to_new(program)
        for index, node in enumerate(attentions):
            ctx.node = node
            add_cache(program, index, node)
        ctx.node = None
        widen_mask(program)
        keep_positions(program)


def add_cache(program: Program, index: int, node: fx.Node) -> None:
    """Give one attention its past, and the program its present."""
    given = named_arguments(node)
    pasts, presents = [], []
    for part in ("k", "v"):
        kind = given[part].meta["type"]
        word = {"k": "key", "v": "value"}[part]
        past = Type((*kind.shape[:2], "past", kind.shape[3]), kind.dtype)
        pasts.append(add_input(program, Input(f"past_{word}_{index}", past, "empty")))
        presents.append((f"present_{word}_{index}", Type((*kind.shape[:2], "total", kind.shape[3]), kind.dtype)))
    args = [given.pop(name) for name in ("q", "k", "v")]
    extra = [given.pop(name) for name in ("mask", "padding", "bias", "sinks")]
    types = (node.meta["type"], *(kind for _, kind in presents))
    with program.graph.inserting_before(node):
        whole = program.call(qc.cached_attention, [*args, *pasts, *extra], given, like=node, type=types)
        parts = [program.call(operator.getitem, (whole, i), like=node, type=types[i]) for i in range(3)]
    node.replace_all_uses_with(parts[0])
    program.graph.erase_node(node)
    for (name, _), present, past_node in zip(presents, parts[1:], pasts, strict=True):
        add_output(program, name, present)
        program.info["caches"] = program.info.get("caches", {}) | {past_node.name: name}


def add_input(program: Program, spec: Input) -> fx.Node:
    """A new placeholder after the others."""
    last = program.placeholders[-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder(spec.name)
    node.meta["type"] = spec.type
    program.inputs = (*program.inputs, spec)
    return node


def add_output(program: Program, name: str, node: fx.Node) -> None:
    """A new output after the others."""
    end = program.output_node
    end.args = ((*end.args[0], node),)  # type: ignore[misc]
    program.outputs = (*program.outputs, name)


def widen_mask(program: Program) -> None:
    """The attention mask now covers past and new positions."""
    wide = Type(("batch", "total"), torch.int64)
    for node in program.placeholders:
        if node.target == "attention_mask":
            node.meta["type"] = wide = Type(wide.shape, node.meta["type"].dtype)
            program.inputs = tuple(
                Input(i.name, wide, i.default) if i.name == "attention_mask" else i for i in program.inputs
            )


def cut_to_new(program: Program) -> None:
    """Values made of the mask span past and new positions from now on; the others take the new ones' alone."""
    counted = from_mask(program)
    ids = program.placeholders[0]
    for node in [n for n in counted if n.op == "call_function"]:
        node.meta["type"] = Type(("batch", "total"), node.meta["type"].dtype)
        readers = [user for user in node.users if user not in counted and not is_size(user)]
        if readers:
            with program.graph.inserting_after(node):
                newest = program.call(aten.slice.Tensor, (node, 1, None, 2**63 - 1), like=node)
            with program.graph.inserting_before(newest):
                length = program.call(aten.sym_size.int, (ids, 1), like=ids)
                start = program.call(operator.neg, (length,), like=ids)
            length.meta["type"] = start.meta["type"] = None
            newest.update_arg(2, start)
            newest.meta["type"] = Type(("batch", "sequence"), node.meta["type"].dtype)
            for reader in readers:
                reader.replace_input_with(node, newest)


def keep_positions(program: Program) -> None:
    """Compute logits only at the positions asked for: select them before the head."""
    values = program.output_node.args[0]
    node: fx.Node = values[program.outputs.index("logits")]  # type: ignore[index,assignment]
    chain = list(head_of(node))
    start = chain[-1]
    selected = start.args[0] if start is not node or is_linear(start) else start
    assert isinstance(selected, fx.Node)
    positions = add_input(program, Input("logits_positions", Type(("kept",), torch.int64), "every"))
    with program.graph.inserting_after(selected):
        kept = program.call(aten.index_select.default, (selected, 1, positions), like=selected)
    kept.meta["type"] = kept_type(selected.meta["type"])
    start.replace_input_with(selected, kept)
    for link in chain:
        link.meta["type"] = kept_type(link.meta["type"])


def head_of(logits: fx.Node) -> Iterator[fx.Node]:
    """From the logits backwards to the linear layer they come from, as long as there is one way only."""
    node = logits
    while not is_linear(node):
        yield node
        before = [a for a in node.all_input_nodes if along(a)]
        if len(before) != 1 or len(before[0].users) != 1 or not is_pointwise(node):
            return
        node = before[0]
    yield node


def is_linear(node: fx.Node) -> bool:
    """Whether a node is a linear layer, float or quantized."""
    return node.target in (aten.linear.default, qc.linear)


def kept_type(kind: Type) -> Type:
    """The type after positions were selected on axis 1."""
    return Type((kind.shape[0], "kept", *kind.shape[2:]), kind.dtype)
