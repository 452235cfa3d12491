"""Axis rules: what each operator does to the labels of its operands' channels (see axes.py)."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler import axis_convolutions
from qcompiler.axes import FIXED, NONE, Axes, Kind, Picked, Stored, labels_of, leaves, settled
from qcompiler.ops import qc
from qcompiler.program import Program, Type
from qcompiler.scheme import Scheme
from qcompiler.text import target_name

aten = torch.ops.aten

Rule = Callable[[Axes, fx.Node], Any]


def analyze(program: Program, kind: Kind) -> Axes:
    """Label every channel of a program, by the rules."""
    axes = Axes(program, kind)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            axes.env[node] = settled(axes.type_of(node))
        elif node.op == "get_attr":
            axes.env[node] = Stored(str(node.target))
        elif node.op == "call_function":
            rule = RULES.get(node.target, Axes.unknown)
            try:
                axes.env[node] = rule(axes, node)
            except (RuntimeError, IndexError):  # shapes that the rule was not made for: fixed, never guessed
                axes.env[node] = axes.unknown(node, f"{target_name(node.target)} has shapes without a rule")
        else:
            axes.fix([axes.env[n] for n in node.all_input_nodes], "the program returns it", node)
            axes.settle(node)
    return axes


# -- rules: moving channels about ------------------------------------------------------------------------------


def moved(axes: Axes, node: fx.Node) -> Any:
    """Reshape and its like: the labels take the value's new shape."""
    labels, shape = labels_of(axes, node.args[0]), axes.type_of(node)
    size = torch.Size(shape).numel()
    if labels.numel() == size:
        return labels.reshape(shape)
    # A dynamic size takes in or gives up a static factor: positions x 2 experts each, for one.
    if size and labels.numel() % size == 0:
        rows = labels.reshape(-1, size)
        axes.tie(rows, rows[:1])
        return rows[0].reshape(shape)
    for start in range(len(shape)):
        if torch.Size(shape[start:]).numel() == labels.numel():
            return labels.reshape(shape[start:]).expand(shape)
    return axes.unknown(node, "it mixes channels with positions")


def repeated(axes: Axes, node: fx.Node) -> Any:
    """Repetition along a dynamic size changes no channels."""
    x = labels_of(axes, node.args[0])
    return x if axes.type_of(node) == tuple(x.shape) else axes.unknown(node)


def expanded(axes: Axes, node: fx.Node) -> Any:
    """A broadcast."""
    return labels_of(axes, node.args[0]).expand(axes.type_of(node))


def permuted(axes: Axes, node: fx.Node) -> Any:
    """Transpose and permute: run on the labels."""
    return node.target(labels_of(axes, node.args[0]), *node.args[1:])  # type: ignore[operator]


def pieces(axes: Axes, node: fx.Node) -> Any:
    """Split, slice, select: channels stay in their piece. Along a dynamic size nothing is cut."""
    x = labels_of(axes, node.args[0])
    source = node.args[0].meta["type"] if isinstance(node.args[0], fx.Node) else None
    dim = _dimension(node, x.dim())
    kind = node.meta["type"]
    if isinstance(source, Type) and isinstance(source.shape[dim], str):
        return [x for _ in kind] if isinstance(kind, tuple) else x.reshape(axes.type_of(node))
    if isinstance(kind, Type) and any(isinstance(size, str) for size in kind.shape[dim : dim + 1]) and x.shape[dim] > 1:
        axes.tie(x, x.narrow(dim, 0, 1))  # some positions of a stored table, which are not known yet
        return x.narrow(dim, 0, 1)
    if any(isinstance(a, fx.Node) for a in node.args[1:]):
        return moved(axes, node)
    found = node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    for piece in leaves(found):
        axes.block(piece.reshape(1, -1))
    return list(found) if isinstance(found, (list, tuple)) else found


def _dimension(node: fx.Node, rank: int) -> int:
    dim = node.kwargs.get("dim", node.args[2] if node.target in SECOND_DIM and len(node.args) > 2 else 0)
    if node.target not in SECOND_DIM and len(node.args) > 1:
        dim = node.args[1]
    assert isinstance(dim, int)
    return dim % rank


def joined(axes: Axes, node: fx.Node) -> Any:
    """Concatenation: of channels they stand side by side, along a dynamic size they are the same."""
    parts = [labels_of(axes, part) for part in node.args[0]]  # type: ignore[union-attr]
    dim = node.args[1] if len(node.args) > 1 else 0
    shape = axes.type_of(node)
    assert isinstance(dim, int)
    if shape[dim] == 1:
        for part in parts[1:]:
            axes.tie(parts[0], part)
        return parts[0].expand(shape)
    for part in parts:
        axes.block(part.reshape(1, -1))
    return torch.cat([p.expand(_except(shape, dim % len(shape), p.shape[dim])) for p in parts], dim)


def _except(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [size if i == dim else s for i, s in enumerate(shape)]


def chosen(axes: Axes, node: fx.Node) -> Any:
    """One of several outputs."""
    value, index = axes.env[node.args[0]], node.args[1]  # type: ignore[index]
    return value[index] if isinstance(value, list) and isinstance(index, int) else axes.unknown(node)


# -- rules: elementwise ----------------------------------------------------------------------------------------


def number(axes: Axes, node: fx.Node) -> Any:
    """A size or another plain number."""
    return None


def shape_read(axes: Axes, node: fx.Node) -> Any:
    """The sizes of a value: its channels are not looked at."""
    return settled(axes.type_of(node))


def linear_map(axes: Axes, node: fx.Node) -> Any:
    """A copy, a sign, a constant factor: any transform passes."""
    return labels_of(axes, node.args[0]).expand(axes.type_of(node))


def homogeneous(axes: Axes, node: fx.Node) -> Any:
    """relu(s x) = s relu(x): factors pass, mixing does not."""
    if axes.kind is Kind.ROTATE:
        return axes.unknown(node, f"{target_name(node.target)} acts on each channel alone")
    if axes.kind is Kind.SIGN:
        return axes.unknown(node, f"{target_name(node.target)} is not odd")
    return labels_of(axes, node.args[0])


def odd(axes: Axes, node: fx.Node) -> Any:
    """f(-x) = -f(x): signs pass, and what passes any function of each channel alone."""
    return linear_map(axes, node) if axes.kind is Kind.SIGN else alone(axes, node)


def alone(axes: Axes, node: fx.Node) -> Any:
    """A function of each channel alone: channels may change places, nothing else; x / number is linear."""
    if node.target is aten.div.Tensor and labels_of(axes, node.args[1]).numel() == 1:
        return linear_map(axes, node)
    if axes.kind is Kind.PERMUTE:
        return together(axes, node)
    what = "odd" if axes.kind is Kind.SIGN else "homogeneous"
    return axes.unknown(node, f"{target_name(node.target)} acts on each channel alone and is not {what}")


def together(axes: Axes, node: fx.Node) -> Tensor:
    """All operands are transformed alike: sums, and for permutations any elementwise operator."""
    shape = axes.type_of(node)
    found, narrow = torch.full(shape, NONE), []
    for operand in node.all_input_nodes:
        labels = labels_of(axes, operand)
        if labels.numel() == 1:
            continue  # one number for all channels
        if labels.shape[-1] == shape[-1]:
            axes.tie(found, labels)
            found = torch.where(found == NONE, labels.expand(shape), found)
        else:  # one number for several channels: it stays, and they keep to themselves
            axes.fix(labels, "it is one value for several channels", node)
            narrow.append(labels)
    if narrow:
        axes.block(found)
    return found


def added(axes: Axes, node: fx.Node) -> Any:
    """A sum: all operands are transformed alike; a number added to a scaled or mixed channel is none."""
    if axes.kind is not Kind.PERMUTE:
        operands = [labels_of(axes, a) for a in node.args[:2]]
        if any(o.numel() == 1 for o in operands) and any(o.numel() > 1 for o in operands):
            return axes.unknown(node, "a number is added to each channel")
    return together(axes, node)


def multiplied(axes: Axes, node: fx.Node) -> Any:
    """A product. For scales the factor passes through one operand; a stored one absorbs it."""
    if axes.kind is Kind.PERMUTE:
        return together(axes, node)
    shape = axes.type_of(node)
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    vectors = [a for a in operands if axes.type_of(a) and torch.Size(axes.type_of(a)).numel() > 1]
    if len(vectors) < 2:  # times a number, or a number a token
        return labels_of(axes, vectors[0]).expand(shape) if vectors else settled(shape)
    stored = [a for a in vectors if isinstance(axes.env[a], Stored)]
    values = [a for a in vectors if a not in stored]
    if axes.kind is Kind.ROTATE:
        return axes.unknown(node, "each channel is multiplied by a factor of its own")
    if len(stored) == 1 and axes.type_of(stored[0])[-1:] == shape[-1:]:
        name = axes.env[stored[0]].name
        weight = axes.program.tensors[name]
        if weight.numel() == torch.Size(shape).numel():
            made = axes.stored(name, None).reshape(weight.shape).expand(shape)
            return made if not values else _rescaled(axes, name, made, values[0], node)
    axes.fix([axes.env[a] for a in stored], "it is one factor for several channels", node)
    free = [a for a in values if bool((labels_of(axes, a) > FIXED).any())]
    kept = free[-1] if free else None  # up in silu(gate) * up
    axes.fix([labels_of(axes, a) for a in free[:-1]], "the other operand of the product takes the factor", node)
    return labels_of(axes, kept).expand(shape) if kept is not None else settled(shape)


def _rescaled(axes: Axes, name: str, made: Tensor, value: fx.Node, node: fx.Node) -> Tensor:
    """A stored factor for each channel makes new ones: it takes up theirs and divides by that of what it multiplies."""
    axes.fix(labels_of(axes, value), "its factor ends at a stored one", node)
    return made


# -- rules: layers ---------------------------------------------------------------------------------------------


def linear(axes: Axes, node: fx.Node) -> Any:
    """x W' + b: absorbs anything on both sides."""
    x, weight = labels_of(axes, node.args[0]), axes.env.get(node.args[1])  # type: ignore[arg-type]
    if not isinstance(weight, Stored):
        return axes.unknown(node, "a computed weight multiplies it")
    columns = axes.stored(weight.name, 1, power=-1)
    axes.read(x, columns)
    axes.block(columns[None])
    rows = axes.stored(weight.name, 0)
    bias = axes.env.get(node.args[2]) if len(node.args) > 2 and isinstance(node.args[2], fx.Node) else None
    if isinstance(bias, Stored):
        axes.tie(rows, axes.stored(bias.name, None).flatten())
    elif bias is not None:
        axes.fix(rows, "its bias is computed", node)
    return rows.expand(axes.type_of(node))


def embedding(axes: Axes, node: fx.Node) -> Any:
    """Rows of a table: its columns are the channels, its rows are called by number."""
    table = axes.env.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(table, Stored):
        return axes.unknown(node)
    axes.fix(axes.stored(table.name, 0), "its rows are called by number", node)
    return axes.stored(table.name, 1).expand(axes.type_of(node))


def norm(axes: Axes, node: fx.Node) -> Any:
    """Permutations pass, and signs an RMSNorm, rotations one without weight; factors start anew at the weight."""
    x, centered = labels_of(axes, node.args[0]), node.target is aten.layer_norm.default
    width = len(node.args[1])  # type: ignore[arg-type]
    parameters = [p for p in node.args[2:4] if isinstance(p, fx.Node)]
    shape = axes.type_of(node)
    if axes.kind is Kind.PERMUTE or (axes.kind is Kind.ROTATE and not centered and _all_ones(axes, parameters)):
        axes.block(x.reshape(-1, torch.Size(x.shape[-width:]).numel()))
        if axes.kind is Kind.PERMUTE:
            for parameter in parameters:
                axes.tie(x, labels_of(axes, parameter))
        return x
    if axes.kind is Kind.SIGN and not centered:
        return x
    if axes.kind in (Kind.ROTATE, Kind.SIGN):
        why = "LayerNorm subtracts the mean over channels" if centered else "the norm's weight is not ones"
        return axes.unknown(node, why)
    axes.fix(x, "a norm measures all channels together", node)
    if not parameters or not all(isinstance(axes.env[p], Stored) for p in parameters):
        return axes.unknown(node, "the norm has no stored weight")
    made = labels_of(axes, parameters[0])
    for parameter in parameters[1:]:
        axes.tie(made, labels_of(axes, parameter))
    return made.expand(shape)


def reordered_norm(axes: Axes, node: fx.Node) -> Any:
    """A norm that stores in another order: its order takes up permutations, its weight factors, nothing passes."""
    x, order = labels_of(axes, node.args[0]), axes.env.get(node.args[3])  # type: ignore[arg-type]
    axes.fix(x, "a norm stores it in another order", node)
    parameters = [axes.env[p] for p in node.args[1:3] if isinstance(p, fx.Node)]
    if not isinstance(order, Stored) or not all(isinstance(p, Stored) for p in parameters):
        return axes.unknown(node, "its order is computed, not stored")
    if axes.kind is Kind.PERMUTE:
        axes.fix([axes.stored(p.name, None) for p in parameters], "they are in the order of the norm's input", node)
        return axes.stored(order.name, None).expand(axes.type_of(node))
    if axes.kind is Kind.ROTATE or not parameters:
        return axes.unknown(node, "a norm has no weight that takes it up")
    first = axes.stored(parameters[0].name, None)
    for parameter in parameters[1:]:
        axes.tie(first, axes.stored(parameter.name, None))
    return first[axes.program.tensors[order.name]].expand(axes.type_of(node))


def _all_ones(axes: Axes, parameters: Sequence[fx.Node]) -> bool:
    names = [axes.env[p].name for p in parameters if isinstance(axes.env[p], Stored)]
    return len(names) == len(parameters) and all(bool((axes.program.tensors[n] == 1).all()) for n in names)


def reduced(axes: Axes, node: fx.Node) -> Any:
    """A sum or mean: of equals it passes anything; over all channels it does not matter in which order."""
    x, shape = labels_of(axes, node.args[0]), axes.type_of(node)
    dims: list[int] = [d % x.dim() for d in node.args[1]]  # type: ignore[union-attr, operator, misc]
    first = x
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    if torch.Size(shape).numel() > 1 and bool((x == first).all()):
        return first.reshape(shape)
    if torch.Size(shape).numel() > 1 or axes.kind is not Kind.PERMUTE:
        return axes.unknown(node)
    axes.block(x.reshape(1, -1))
    return torch.full(shape, NONE)


def largest(axes: Axes, node: fx.Node) -> Any:
    """A maximum: it passes what a sum does, but no mixing and no signs."""
    if axes.kind in (Kind.ROTATE, Kind.SIGN) or len(node.args) < 2:
        return axes.unknown(node)
    return reduced(axes, node)


def indexed(axes: Axes, node: fx.Node) -> Any:
    """Experts picked by position; channels picked by a stored index. Anything else is unknown."""
    value, indices = axes.env[node.args[0]], node.args[1]  # type: ignore[index]
    assert isinstance(indices, (list, tuple))
    stored = [axes.env[i] if isinstance(i, fx.Node) else None for i in indices]
    if isinstance(value, Stored) and len(indices) == 1:
        rank = axes.program.tensors[value.name].dim()
        return Picked(value.name) if rank == 3 else embedding(axes, node) if rank == 2 else axes.unknown(node)
    if isinstance(value, Tensor) and all(i is None or isinstance(i, Stored) for i in stored):
        found = value[tuple(slice(None) if i is None else axes.program.tensors[i.name] for i in stored)]
        axes.block(found.reshape(1, -1))
        return found
    return axes.unknown(node)


def batched(axes: Axes, node: fx.Node) -> Any:
    """W x with a matrix for each position: as a linear layer."""
    picked, x = axes.env[node.args[0]], labels_of(axes, node.args[1])  # type: ignore[index]
    if not isinstance(picked, Picked) or x.shape[-1] != 1:
        return axes.unknown(node)
    columns = axes.stored(picked.name, 2, power=-1)
    axes.tie(x.flatten(), columns)
    axes.block(columns[None])
    return axes.stored(picked.name, 1)[:, None].expand(axes.type_of(node))


def rope(axes: Axes, node: fx.Node) -> Any:
    """Rotary positions: the two channels of a pair and their angle stay together; a head's pairs may change places."""
    x, cos, sin = (labels_of(axes, a) for a in node.args[:3])
    if axes.kind is Kind.ROTATE:
        return axes.unknown(node, "rotary positions turn pairs of channels")
    half = axes.type_of(node.args[1])[-1]  # type: ignore[arg-type]
    turned = x[..., : 2 * half]
    pairs = turned.unflatten(-1, (half, 2)) if node.kwargs.get("interleaved") else turned.unflatten(-1, (2, half)).mT
    axes.tie(pairs[..., 0], pairs[..., 1])
    axes.block(turned)
    if axes.kind.is_factor:
        axes.fix([cos, sin], "they are cosines and sines", node)
    else:
        for angle in (cos, sin):
            axes.tie(pairs[..., 0], angle.unsqueeze(1) if angle.dim() else angle)
    if x.shape[-1] > 2 * half:
        axes.block(x[..., 2 * half :])
    return x


def attention(axes: Axes, node: fx.Node) -> Any:
    """Heads: a query's channels meet those of its group's key, a value's come out; none leaves its head."""
    q, k, v = (labels_of(axes, a) for a in node.args[:3])
    extra = [axes.env.get(a) for a in node.args[3:] if isinstance(a, fx.Node)]
    extra += [axes.env.get(a) for a in node.all_input_nodes if a not in node.args]  # the grids
    axes.fix(extra, "attention reads it", node)
    group = q.shape[1] // k.shape[1]
    axes.tie(q, k.repeat_interleave(group, dim=1), inverse=True)
    for value, scheme in ((q, ""), (k, node.kwargs.get("key")), (v, node.kwargs.get("value"))):
        axes.block(value)
        if scheme and not (axes.kind is Kind.PERMUTE and _minds_no_order(str(scheme))):
            axes.fix(value, "attention rounds it", node)
    return v.repeat_interleave(group, dim=1).expand(axes.type_of(node))


def _minds_no_order(scheme: str) -> bool:
    """Whether a head's channels may change places before they are rounded."""
    kind = Scheme.parse(scheme)
    return kind.dynamic and kind.granularity in ("token", "channel")


MOVES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
)
COPIES = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.neg.default,
)
CUTS = (aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
SECOND_DIM = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
HOMOGENEOUS = (aten.relu.default, aten.leaky_relu.default, aten.abs.default)
ODD = (aten.tanh.default, aten.sin.default)
ALONE = (
    aten.silu.default,
    aten.gelu.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.cos.default,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.square.default,
    aten.softplus.default,
    aten.clamp.default,
    aten.elu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.div.Tensor,
    aten.pow.Tensor_Tensor,
)
FUNCTIONS = (*HOMOGENEOUS, *ODD, *ALONE)  # of each number by itself, none of them linear

RULES: dict[Any, Rule] = {
    **dict.fromkeys(MOVES, moved),
    **dict.fromkeys(COPIES, linear_map),
    **dict.fromkeys(CUTS, pieces),
    **dict.fromkeys(ODD, odd),
    **dict.fromkeys(ALONE, alone),
    aten.expand.default: expanded,
    aten.transpose.int: permuted,
    aten.permute.default: permuted,
    aten.cat.default: joined,
    **dict.fromkeys(HOMOGENEOUS, homogeneous),
    aten.add.Tensor: added,
    aten.sub.Tensor: added,
    aten.mul.Tensor: multiplied,
    operator.getitem: chosen,
    aten.index.Tensor: indexed,
    aten.bmm.default: batched,
    aten.repeat_interleave.self_int: repeated,
    aten.mean.dim: reduced,
    aten.sum.dim_IntList: reduced,
    aten.amax.default: largest,
    aten.sym_size.int: number,
    aten._shape_as_tensor.default: shape_read,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.layer_norm.default: norm,
    aten.rms_norm.default: norm,
    qc.reordered_norm: reordered_norm,
    qc.rope: rope,
    qc.attention: attention,
    **axis_convolutions.RULES,
}
