"""fuse: linear layers that read the same value become one, followed by a split."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.errors import No
from qcompiler.ops import qc
from qcompiler.passes.selection import layers_of, weight_name
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program, Type
from qcompiler.scheme import BY_ROW, QTensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse(Pass):
    """Merge linear layers that share their input (query, key and value; gate and up) into one.

    The rows of the weights, or of their codes, scales and zeros, are put one below the other, so every output is
    the same sum of the same products; `split_with_sizes` takes the wide output apart again.
    """

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, ctx: Context) -> None:
        """Fuse every group of siblings; those that cannot be are refused with the reason."""
        for siblings in groups(program):
            answer = may_fuse(program, siblings)
            if answer:
                fuse(program, siblings)
            else:
                ctx.refuse(No(answer.reason, joined_name([weight_name(n) for n in siblings])))


def groups(program: Program) -> list[list[fx.Node]]:
    """Linear layers that share input and module, two or more each, in graph order."""
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in layers_of(program):
        found.setdefault((node.args[0], *_family(program, node)), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _family(program: Program, node: fx.Node) -> list[str]:
    """What siblings have in common: all words but one of their names, or of their paths where names say nothing.

    They are told apart by the last word but one: `q_proj` in `self_attn.q_proj.weight` or in `self_attn/q_proj/MatMul`.
    """
    if program.info.get("frontend") == "onnx":
        return str(node.meta.get("path", "")).split("/")[:-2] or [weight_name(node)]
    words = weight_name(node).split(".")
    return [*words[:-2], words[-1]]


def may_fuse(program: Program, siblings: Sequence[fx.Node]) -> Any:
    """True, or a No that says what keeps these linear layers apart."""
    names = [weight_name(n) for n in siblings]
    if len(set(names)) < len(names):
        return No("one weight is used twice")
    for name in names:
        if len(readers(program, name)) > 1:
            return No(f"{name} is tied: it is used elsewhere too")
    biases = [bias_of(n) for n in siblings]
    if len({bias is None for bias in biases}) > 1:
        return No("some have a bias and some have none")
    if any(bias is not None and bias.op != "get_attr" for bias in biases):
        return No("a bias is computed, not stored")
    quantized = [name in program.quantized for name in names]
    if not any(quantized):
        dtypes = {program.tensors[name].dtype for name in names}
        return len(dtypes) == 1 or No(f"weights of different dtypes {sorted(map(str, dtypes))}")
    if not all(quantized):
        return No("some are quantized and some are not")
    return may_stack([program.qtensor(name) for name in names])


def may_stack(weights: Sequence[QTensor]) -> Any:
    """True if the rows of these quantized tensors may stand below each other in one, or a No."""
    first = weights[0]
    for other in weights[1:]:
        if other.scheme != first.scheme:
            return No(f"schemes {first.scheme} and {other.scheme} differ")
        if other.parts().keys() != first.parts().keys() or other.dtype != first.dtype:
            return No("they are stored in different parts")
        for part in SHARED:
            mine, theirs = getattr(first, part), getattr(other, part)
            if mine is not None and not torch.equal(mine, theirs):
                return No(f"each has a {part} of its own")
    if first.scheme.granularity == "tensor":
        return No("each has one scale for the whole tensor")
    if first.axis not in (-1, 1):
        return No("their groups do not lie in rows")
    for part in ("scale", "minimum"):
        if isinstance(getattr(first, part), QTensor):
            answer = may_stack([getattr(w, part) for w in weights])
            if not answer:
                return No(f"their scales are quantized too: {answer.reason}")
    return all(w.by_row for w in weights) or No("their scales are quantized too, and not row by row")


SHARED = ("codebook", "boundaries", "permutation")


def stack(weights: Sequence[QTensor]) -> QTensor:
    """The rows of all weights in one tensor; `may_stack` holds."""
    parts: dict[str, Any] = {}
    for name in BY_ROW:
        rows = [getattr(w, name) for w in weights]
        if isinstance(rows[0], QTensor):
            parts[name] = stack(rows)
        elif rows[0] is not None:
            parts[name] = torch.cat([promoted(part, rows) for part in rows])
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
    return weights[0].with_parts(shape=shape, **parts)


def promoted(tensor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The tensor in the widest dtype of `others`: scales may be stored in 16 bits here and in 32 there."""
    return tensor.to(max((o.dtype for o in others), key=lambda dtype: dtype.itemsize))


def fuse(program: Program, siblings: Sequence[fx.Node]) -> None:
    """Put one linear layer and a split in the place of `siblings`."""
    first, names = siblings[0], [weight_name(n) for n in siblings]
    name = joined_name(names)
    rows = [n.meta["type"].shape[-1] for n in siblings]
    whole = Type((*first.meta["type"].shape[:-1], sum(rows)), first.meta["type"].dtype)
    with program.graph.inserting_before(first):
        bias = stacked_bias(program, siblings, name)
        if names[0] in program.quantized:
            weight = stack([program.qtensor(n) for n in names])
            args: tuple[Any, ...] = (first.args[0], program.add_qtensor(name, weight), *bias)
            wide = program.call(qc.linear, args, {"spec": weight.spec()}, like=first, type=whole)
        else:
            program.tensors[name] = torch.cat([program.tensors[n] for n in names])
            args = (first.args[0], program.get(name, first), *bias)
            wide = program.call(aten.linear.default, args, like=first, type=whole)
        types = tuple(n.meta["type"] for n in siblings)
        split = program.call(aten.split_with_sizes.default, (wide, rows, -1), like=first, type=types)
        pieces = [
            program.call(operator.getitem, (split, i), like=node, type=node.meta["type"])
            for i, node in enumerate(siblings)
        ]
    program.info.setdefault("fused", {})[name] = dict(zip(names, rows, strict=True))
    for node, piece in zip(siblings, pieces, strict=True):
        node.replace_all_uses_with(piece)
        program.graph.erase_node(node)
    program.clean()


def stacked_bias(program: Program, siblings: Sequence[fx.Node], weight: str) -> tuple[fx.Node, ...]:
    """A get_attr node of the biases one below the other; nothing if there are none."""
    biases = [bias for node in siblings if (bias := bias_of(node)) is not None]
    if not biases:
        return ()
    name = joined_name([str(bias.target) for bias in biases])
    program.tensors[name] = torch.cat([program.tensors[str(bias.target)] for bias in biases])
    return (program.get(name, siblings[0]),)


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias node of a linear layer, if it has one."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) else None


def readers(program: Program, name: str) -> set[fx.Node]:
    """The calls that use the stored tensor `name` or its parts."""

    def sources() -> Iterator[fx.Node]:
        for node in program.graph.nodes:
            if node.op == "get_attr" and str(node.target).partition("::")[0] == name:
                yield node

    return {user for source in sources() for user in source.users}


def joined_name(names: Sequence[str]) -> str:
    """A name for several tensors in one.

    >>> joined_name(["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"])
    'attn.qkv_proj.weight'
    >>> joined_name(["mlp.gate_proj.weight", "mlp.up_proj.weight"])
    'mlp.gate_up_proj.weight'
    >>> joined_name(["a.query.weight", "a.key.weight"])
    'a.query_key.weight'
    """
    rows = [name.split(".") for name in names]
    if len({len(row) for row in rows}) > 1:
        return "+".join(names)
    return ".".join(joined_word(words) for words in zip(*rows, strict=True))


def _common_ending(words: Sequence[str]) -> str:
    """The letters that all words end in."""
    backwards = zip(*(word[::-1] for word in words), strict=False)
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, backwards))[::-1]


def joined_word(words: Sequence[str]) -> str:
    """The words in one: what they end in alike is written once."""
    if len(set(words)) == 1:
        return words[0]
    alike = _common_ending(words)
    ending = alike[alike.index("_") :] if "_" in alike else ""
    stems = [word.removesuffix(ending) for word in words]
    return ("" if all(len(stem) == 1 for stem in stems) else "_").join(stems) + ending
