"""QuaRot: rotations that make outliers go away (Ashkboos et al., arXiv 2404.00456).

A channel that is much louder than the others costs the others their precision when all are rounded on one grid. A
Hadamard matrix spreads each channel over all of them; where the weights around absorb it, the function stays the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.axes import place
from qcompiler.axis_rules import FUNCTIONS
from qcompiler.errors import No, RecipeError, nearest
from qcompiler.hadamard import base_order, hadamard, random_rotation, transform
from qcompiler.ops import qc
from qcompiler.passes.open_norms import PLAIN, open_norms, users_of
from qcompiler.passes.selection import weight_name
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.sites import Kind, Site, find

aten = torch.ops.aten

SITES = ("residual", "heads", "qk", "hidden")
NOT_LINEAR = {*FUNCTIONS, aten.mul.Tensor}
DENSE = 256  # a matrix of a larger order than this would cost a layer of its own


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate channels by Hadamard matrices that the weights around take up; with `online`, by an operator elsewhere.

    `sites` says which channels, the graph where they are (the paper, section 4, goes by the names of Llama's layers):

    - `residual`: the stream that linear layers and norms carry. Norms are folded first, LayerNorm becomes RMSNorm (see
      open_norms.py), and a head tied to the embedding gets a weight of its own.
    - `heads`: values, up to the linear layer after the attention.
    - `qk`: queries and keys. Rotary positions do not let a rotation pass: after them it takes `qc.hadamard`.
    - `hidden`: what a function of each channel alone makes for a linear layer, as in an MLP: always `qc.hadamard`.

    Folded rotations have random signs, as in the paper. It also mixes the heads with each other before the linear layer
    after the attention, by another operator; this does not.
    """

    name: ClassVar[str] = "rotate"
    contract: ClassVar[Contract] = Contract.EXACT

    sites: tuple[str, ...] = SITES
    online: bool = False

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in SITES:
                raise RecipeError(f'pass "rotate": there is no site "{site}"; {nearest(site, SITES)}')

    def run(self, program: Program, ctx: Context) -> None:
        if "residual" in self.sites:
            open_norms(program, ctx)
        random, folded, online = ctx.generator(), Counter[str](), Counter[str]()
        sites = named_sites(program)
        for kind, site in sites:
            if kind in self.sites:
                site.rotate(program, random_rotation(site.channels, random))
                folded[_described(kind, site)] += 1
        for where in out_of_reach(program, sites):
            if where.kind in self.sites:
                answer = where.rotate(program) if self.online else True
                if isinstance(answer, No):
                    ctx.refuse(answer)
                else:
                    online[str(where)] += 1
        for what, count in folded.items():
            ctx.note(f"rotated by weights alone: {count} x {what}")
        for what, count in online.items():
            ctx.note(f"{'rotated by qc.hadamard' if self.online else 'only online=true rotates'}: {count} x {what}")
        if not folded and not (online and self.online):
            ctx.refuse(No(f"no weights absorb a rotation, at any of {', '.join(self.sites)}"))


def _described(kind: str, site: Site) -> str:
    size = f"{site.blocks} x {site.channels}" if site.blocks > 1 else f"{site.channels}"
    how = "" if hadamard(site.channels) is not None else ", no Hadamard matrix of that size: a random rotation"
    return f"{kind}, {size} channels{how}"


def named_sites(program: Program) -> list[tuple[str, Site]]:
    """The sites that weights alone can rotate, each with its name in `SITES`: what the attention says of it."""
    names: dict[fx.Node, str] = {}
    for node in program.calls(qc.attention):
        names |= dict(zip(_operands(node), ("qk", "qk", "heads"), strict=True))
    by_name = {value.name: name for value, name in names.items()}
    found = find(program, Kind.ROTATE, list(names))
    return [(next((by_name[value] for value in site.seen), "residual"), site) for site in found]


def _operands(attention: fx.Node) -> list[fx.Node]:
    """Query, key and value."""
    return [value for value in attention.args[:3] if isinstance(value, fx.Node)]


@dataclass(frozen=True)
class Place:
    """Values that only an operator can rotate: the first operands of each of the `readers`."""

    kind: str
    values: Sequence[fx.Node]
    readers: Sequence[fx.Node]

    def __str__(self) -> str:
        blocks = "" if self.size == self.channels else f" in blocks of {self.size}"
        return f"{self.kind}, {self.channels} channels{blocks}"

    @property
    def channels(self) -> int:
        """How many channels each value has."""
        return int(self.values[0].meta["type"].shape[-1])

    @property
    def size(self) -> int:
        """How many of them are mixed: all, where a matrix of that order is cheap, or the power of two in them."""
        base = base_order(self.channels)
        return self.channels if base is not None and base <= DENSE else self.channels & -self.channels

    def rotate(self, program: Program) -> bool | No:
        """Put the operator before the readers, and its inverse into the weights by which they multiply, if they do."""
        first, names = self.readers[0], {name for node in self.readers if (name := weight_name(node))}
        if self.size == 1:
            return No(f"no Hadamard matrix divides {self.channels} channels", place(first))
        if any(user not in self.readers for name in names for user in users_of(program, name)):
            return No("its weight is also used elsewhere", place(first))
        for i, value in enumerate(self.values):
            with program.graph.inserting_before(first):
                turned = program.call(qc.hadamard, (value,), {"size": self.size}, like=first, type=value.meta["type"])
            for node in self.readers:
                node.update_arg(i, turned)
        for name in names:
            weight = program.tensors[name]
            program.tensors[name] = transform(weight.double(), self.size).to(weight.dtype)
            program.codes.pop(name, None)
        return True


def out_of_reach(program: Program, sites: Sequence[tuple[str, Site]]) -> Iterator[Place]:
    """Queries and keys, and the hidden channels of linear layers, that none of the sites holds."""
    seen = {name for _, site in sites for name in site.seen}
    held = {(use.tensor, use.axis) for _, site in sites for use in site.uses}
    for node in program.calls(qc.attention):
        query, key, _ = _operands(node)
        if query.name not in seen:
            yield Place("qk", [query, key], [node])
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in program.linears():
        value = node.all_input_nodes[0]
        if _source(value).target in NOT_LINEAR and (weight_name(node), 1) not in held:
            readers.setdefault(value, []).append(node)
    yield from (Place("hidden", [value], layers) for value, layers in readers.items())


def _source(value: fx.Node) -> fx.Node:
    """What made a value, reshapes and copies aside."""
    while value.target in PLAIN:
        value = value.all_input_nodes[0]
    return value
