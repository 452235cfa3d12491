"""Norms that rotations pass: what a norm multiplies, adds and subtracts goes into the weights around it.

||R x|| = ||x||, so an RMSNorm without a weight commutes with any rotation R. SliceGPT (Ashkboos et al., arXiv
2401.15024, section 3.1) brings a transformer to that form: a norm's weight and bias go into the linear layers that read
it, and LayerNorm(x) is RMSNorm(C x) with C = I - 11'/n, which goes into what makes x.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.axes import place
from qcompiler.axis_rules import COPIES, HOMOGENEOUS, MOVES
from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.passes.selection import weight_name
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.rewrite import named_arguments
from qcompiler.sites import Kind, find

aten = torch.ops.aten

PLAIN = {*MOVES, *COPIES} - {aten.neg.default}


def open_norms(program: Program, ctx: Context) -> None:
    """Fold all norms that can be, if rotations then pass more of them than before; refuse those that block still.

    Norms of queries and keys are no part of a stream: they are left alone without a word.
    """
    before = passed(program)
    if len(before) == len(norms(program)):
        return
    trial = program.copy()
    notes = list(untie(trial))
    fold_tables(trial)
    fold_biases(trial)
    fold_weights(trial)
    center(trial)
    trial.clean()
    after = passed(trial)
    for norm in norms(trial):
        if norm not in after and not _reaches_attention(norm):
            ctx.refuse(No(f"rotations do not pass it: {_why_closed(trial, norm)}", place(norm)))
    if len(after) > len(before):
        program.restore(trial)
        for note in notes:
            ctx.note(note)


def norms(program: Program) -> list[fx.Node]:
    """All norms of a program."""
    return list(program.calls(aten.rms_norm.default, aten.layer_norm.default))


def passed(program: Program) -> list[fx.Node]:
    """The norms that rotations pass."""
    inputs = {norm: norm.all_input_nodes[0] for norm in norms(program)}
    seen = {name for site in find(program, Kind.ROTATE, list(inputs.values())) for name in site.seen}
    return [norm for norm, x in inputs.items() if x.name in seen]


def _why_closed(program: Program, norm: fx.Node) -> str:
    """What of a norm could not be folded."""
    if norm.target is aten.layer_norm.default and _argument(norm, 3) is not None:
        return "its bias is read by more than linear layers"
    if not _weightless(program, norm):
        return "its weight multiplies what more than linear layers read"
    if norm.target is aten.layer_norm.default:
        return "LayerNorm subtracts the mean, and more than such norms reads its input"
    return "another operator makes or reads its input that they do not pass"


def _reaches_attention(value: fx.Node) -> bool:
    """Whether a value comes to an attention before any linear layer."""
    waiting, seen = [value], {value}
    while waiting:
        fresh = {user for user in waiting.pop().users if user.target is not aten.linear.default} - seen
        if any(user.target is qc.attention for user in fresh):
            return True
        seen |= fresh
        waiting += fresh
    return False


# -- tied weights ----------------------------------------------------------------------------------------------


def untie(program: Program) -> Iterator[str]:
    """Give linear layers that share their weight with an embedding a copy of their own; yields what it costs."""
    for node in program.linears():
        name = weight_name(node)
        if all(user.target is aten.linear.default for user in users_of(program, name)):
            continue
        tensor, path = program.tensors[name], node.meta.get("path")
        with program.graph.inserting_before(node):
            own = program.store(f"{path}.weight" if path else f"{name}_untied", tensor, like=node)
        node.update_arg(1, own)
        yield f"{name} is no longer tied: {own.target} is a copy of its own, {tensor.nbytes / 1e6:.1f} MB more"


def users_of(program: Program, name: str) -> Iterator[fx.Node]:
    """The calls that read the stored tensor `name`."""
    for source in program.graph.nodes:
        if source.op == "get_attr" and source.target == name:
            yield from source.users


# -- first of all: embeddings ------------------------------------------------------------------------------------


def fold_tables(program: Program) -> None:
    """Norm(table[ids]) = Norm(table)[ids]: a norm that alone reads an embedding is taken of the table's rows."""
    for norm in norms(program):
        x = norm.all_input_nodes[0]
        table = program.tensor_of(x.args[0]) if x.target is aten.embedding.default else None
        if table is None or list(x.users) != [norm] or norm.meta["type"] != x.meta["type"]:
            continue
        parameters = [program.tensor_of(a) if isinstance(a, fx.Node) else a for a in norm.args[1:]]
        wide = [a.double() if isinstance(a, Tensor) else a for a in parameters]
        rows = norm.target(table.double(), *wide).to(table.dtype)  # type: ignore[operator]
        with program.graph.inserting_before(x):
            x.update_arg(0, program.store(f"{x.args[0].target}_normed", rows, like=x))  # type: ignore[union-attr]
        norm.replace_all_uses_with(x)
        program.clean()


# -- forwards: biases and weights --------------------------------------------------------------------------------


def fold_biases(program: Program) -> None:
    """W (y + b) + c = W y + (W b + c): the biases of LayerNorms go into those of the linear layers that read them."""
    for norm in program.calls(aten.layer_norm.default):
        bias, layers = program.tensor_of(_argument(norm, 3)), _readers(program, norm)
        if bias is None or not layers:
            continue
        for layer in layers if bool((bias != 0).any()) else ():
            _add_bias(program, layer, program.weight(layer).double() @ bias.double())
        norm.update_arg(3, None)


def _readers(program: Program, value: fx.Node) -> list[fx.Node]:
    """The linear layers that read a value, if they alone do and have stored weights and biases; else none."""
    found: list[fx.Node] = []
    width = value.meta["type"].shape[-1]
    for user in value.users:
        if user.meta.get("type") is None:  # a size
            continue
        inner = [user] if _stored_linear(program, user, value, width) else []
        if user.target in PLAIN:
            inner = _readers(program, user)
        if not inner:
            return []
        found += inner
    return found


def _stored_linear(program: Program, node: fx.Node, x: fx.Node, width: int) -> bool:
    if node.target is not aten.linear.default or node.args[0] is not x:
        return False
    weight = program.tensor_of(node.args[1])
    bias = _argument(node, 2)
    stored = weight is not None and weight.shape[1] == width
    return stored and (bias is None or program.tensor_of(bias) is not None)


def _add_bias(program: Program, layer: fx.Node, value: Tensor) -> None:
    """Add float64 `value` [rows] to the bias of a linear layer, which may have none yet."""
    own, name = program.tensor_of(_argument(layer, 2)), weight_name(layer)
    dtype = program.tensors[name].dtype if own is None else own.dtype
    total = (value if own is None else value + own.double()).to(dtype)
    bias = f"{name.removesuffix('.weight')}.bias" if own is None else str(layer.args[2].target)  # type: ignore[union-attr]
    if own is not None and len(list(users_of(program, bias))) == 1:
        program.tensors[bias] = total
        return
    with program.graph.inserting_before(layer):
        layer.args = (*layer.args[:2], program.store(bias, total, like=layer))


def fold_weights(program: Program) -> None:
    """W (w y) = (W diag(w)) y: a stored factor of each channel goes into the linear layers that read the channels.

    Factors may be zero or negative, except where something between is linear for positive ones only.
    """
    halves = [node.all_input_nodes[0] for node in program.calls(*HOMOGENEOUS)]
    for site in find(program, Kind.SCALE, halves):
        makers = [i for i, use in enumerate(site.uses) if use.power > 0]
        if len(makers) != 1 or any(bool((e != site.exponents[0].flatten()[0]).any()) for e in site.exponents):
            continue
        name, places = site.uses[makers[0]].tensor, site.positions[makers[0]]
        weight, users = program.tensors[name], list(users_of(program, name))
        whole = site.uses[makers[0]].axis is None and places.shape == (1, 1, weight.numel())
        if not whole or not all(user.target in MULTIPLIERS for user in users):
            continue
        if site.seen and bool((weight <= 0).any()):
            continue
        site.rewrite(program, partial(_times, factors=weight.flatten()[places[0, 0]].double()), power=-1)
        program.tensors[name] = torch.ones_like(weight)
        for user in [user for user in users if user.target is aten.mul.Tensor]:
            _bypass(user, name)


def _times(values: Tensor, factors: Tensor) -> Tensor:
    """Values [blocks, copies, channels, ...] times factors [channels]."""
    return values * factors.view(-1, *[1] * (values.dim() - 3))


MULTIPLIERS = (aten.rms_norm.default, aten.layer_norm.default, aten.mul.Tensor)


def _bypass(product: fx.Node, ones: str) -> None:
    """Put what is multiplied by ones in the place of the product."""
    value = next(node for node in product.all_input_nodes if node.target != ones)
    if value.meta["type"] == product.meta["type"]:
        product.replace_all_uses_with(value)


# -- backwards: means --------------------------------------------------------------------------------------------


def center(program: Program) -> None:
    """Make a LayerNorm an RMSNorm where what makes its input can be centered.

    LayerNorm(x) = RMSNorm(C x). C is put in as a linear layer; then the sites say what makes x and what reads it. As
    C C = C, and linear maps of channels pass where rotations do (but for norms), the makers take C up if every reader
    is such a layer.
    """
    inserted = [_split(program, norm, f"centering_{i}") for i, norm in enumerate(_plain_layer_norms(program))]
    names = {weight_name(linear) for linear, _ in inserted}
    taken: set[str] = set()
    for site in find(program, Kind.ROTATE, [norm.all_input_nodes[0] for norm in norms(program)]):
        readers = {use.tensor for use in site.uses if use.power < 0}
        whole = site.blocks == 1 and {program.tensors[name].shape[1] for name in readers & names} == {site.channels}
        if whole and readers <= names and not site.seen:
            site.rewrite(program, lambda values: values - values.mean(2, keepdim=True), power=1)
            taken |= readers
    for linear, norm in inserted:
        if weight_name(linear) in taken:
            norm.update_arg(0, linear.args[0])
        else:
            args = (linear.args[0], norm.args[1], norm.args[2], None, norm.args[3])
            program.replace(norm, aten.layer_norm.default, args)
    program.clean()


def _plain_layer_norms(program: Program) -> list[fx.Node]:
    """LayerNorms that nothing but the mean keeps from being RMSNorms."""
    found = program.calls(aten.layer_norm.default)
    return [n for n in found if _argument(n, 3) is None and _weightless(program, n) and len(n.args[1]) == 1]  # type: ignore[arg-type]


def _split(program: Program, norm: fx.Node, name: str) -> tuple[fx.Node, fx.Node]:
    """RMSNorm(C x) in the place of LayerNorm(x); only the shape of C is ever asked for."""
    given = named_arguments(norm)
    x, shape, weight, epsilon = (given[name] for name in ("input", "normalized_shape", "weight", "eps"))
    assert isinstance(x, fx.Node)
    width = x.meta["type"].shape[-1]
    with program.graph.inserting_before(norm):
        matrix = program.store(name, torch.zeros(1, 1).expand(width, width), like=norm)
        linear = program.call(aten.linear.default, (x, matrix), like=norm, type=x.meta["type"])
    return linear, program.replace(norm, aten.rms_norm.default, (linear, shape, weight, epsilon))


# -- small change ------------------------------------------------------------------------------------------------


def _argument(node: fx.Node, index: int) -> Any:
    """A call's positional argument; None if it is absent."""
    return node.args[index] if len(node.args) > index else None


def _weightless(program: Program, norm: fx.Node) -> bool:
    """Whether a norm has no weight, or ones."""
    weight = program.tensor_of(_argument(norm, 2))
    return _argument(norm, 2) is None if weight is None else bool((weight == 1).all())
