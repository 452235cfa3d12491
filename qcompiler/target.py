"""Kernel, Backend, place: which implementation runs each op, and why the others do not."""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.errors import BackendError, No
from qcompiler.program import Program
from qcompiler.scheme import QTensor

Answer = bool | No  # True, or a No with its reason


@dataclass(frozen=True)
class Accept:
    """A printable condition on a QTensor; `a & b` is both, and the first No is the answer.

    >>> condition = bits(4, 8) & group(32, 64)
    >>> str(condition)
    'bits(4, 8) & group(32, 64)'
    """

    text: str
    check: Callable[[QTensor], Answer]

    def __call__(self, weight: QTensor) -> Answer:
        return self.check(weight)

    def __and__(self, other: "Accept") -> "Accept":
        def both(weight: QTensor) -> Answer:
            first = self.check(weight)
            return other.check(weight) if first else first

        return Accept(f"{self.text} & {other.text}", both)

    def __str__(self) -> str:
        return self.text


def bits(*allowed: int) -> Accept:
    """The code width is one of `allowed`."""

    def check(weight: QTensor) -> Answer:
        return weight.scheme.bits in allowed or No(f"{weight.scheme.bits} bits, not one of {list(allowed)}")

    return Accept(f"bits({', '.join(map(str, allowed))})", check)


def group(*allowed: int) -> Accept:
    """The group size is one of `allowed`."""

    def check(weight: QTensor) -> Answer:
        size = weight.scheme.group_of(weight.columns)
        return size in allowed or No(f"groups of {size}, not one of {list(allowed)}")

    return Accept(f"group({', '.join(map(str, allowed))})", check)


def channel_or_group(*allowed: int) -> Accept:
    """Each row has one scale, or the group size is one of `allowed`."""

    def check(weight: QTensor) -> Answer:
        size = weight.scheme.group_of(weight.columns)
        return size == weight.columns or size in allowed or No(f"groups of {size}, not one of {list(allowed)}")

    return Accept(f"channel_or_group({', '.join(map(str, allowed))})", check)


def integer_codes() -> Accept:
    """The codes are integers, and the scales plain floats."""

    def check(weight: QTensor) -> Answer:
        if weight.scheme.code != "int":
            return No(f"{weight.scheme.code} codes, not integers")
        plain = isinstance(weight.scale, Tensor) and not isinstance(weight.minimum, QTensor)
        return plain or No("the scales are quantized themselves")

    return Accept("integer_codes()", check)


def matrix() -> Accept:
    """The weight has two axes, and its groups run along the second."""

    def check(weight: QTensor) -> Answer:
        if len(weight.shape) != 2:
            return No(f"{len(weight.shape)} axes, not 2")
        return weight.axis in (-1, 1) or No("groups do not lie in its rows")

    return Accept("matrix()", check)


def k_multiple_of(unit: int) -> Accept:
    """The group axis is a multiple of `unit`."""

    def check(weight: QTensor) -> Answer:
        return weight.columns % unit == 0 or No(f"k={weight.columns} is not a multiple of {unit}")

    return Accept(f"k_multiple_of({unit})", check)


def k_at_most(most: int) -> Accept:
    """The group axis is no longer than `most`."""

    def check(weight: QTensor) -> Answer:
        return weight.columns <= most or No(f"k={weight.columns} is more than {most}")

    return Accept(f"k_at_most({most})", check)


def without(*parts: str) -> Accept:
    """The QTensor has none of the named parts (codebook, permutation, boundaries, minimum, zero)."""

    def check(weight: QTensor) -> Answer:
        present = [part for part in parts if getattr(weight, part) is not None]
        return not present or No(f"has a {present[0]}")

    return Accept(f"without({', '.join(parts)})", check)


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op over a QTensor: its name, the op, what it accepts."""

    name: str
    op: str
    accepts: Accept


NO_CACHE = "this program has no cache; add the pass kv_cache to the recipe (or see why it refused, in the report)"


class Decoder(abc.ABC):
    """A running generation: cache state of one batch of sequences, fed step by step."""

    @abc.abstractmethod
    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Append ids [batch, new]; returns the logits [batch, vocabulary] of the last position.

        Prompts of unequal length are padded on the left: in the first step `mask` [batch, new] is zero there.
        BackendError where the program cannot take padding.
        """


class GrowingDecoder(Decoder):
    """Caches that grow, as the program says; `run` runs it."""

    def __init__(self, program: Program, run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        self.program, self.run = program, run
        self.state: dict[str, Tensor] = {}
        self.mask: Tensor | None = None

    def step(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = self._padding(ids, mask)
        first = self.program.inputs[0].name
        outputs = self.run({first: ids, **self.program.newest_logits(ids), **padding, **self.state})
        self.state = self.program.cache_updates(outputs)
        return outputs["logits"][:, -1].to(ids.device)

    def _padding(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The inputs that tell padding from tokens, and where tokens stand; none if nothing is padded."""
        if self.mask is None and (mask is None or bool(mask.all())):
            return {}
        names = {spec.name for spec in self.program.inputs}
        if "attention_mask" not in names:
            raise BackendError("this program has no attention mask: give prompts of equal length, or one at a time")
        new = torch.ones_like(ids) if mask is None else mask.to(ids)
        self.mask = new if self.mask is None else torch.cat([self.mask, new], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return {"attention_mask": self.mask} | ({"position_ids": positions} if "position_ids" in names else {})


class Runner(abc.ABC):
    """A lowered program, ready to run; `refusals` are why parts of it run otherwise than they could."""

    refusals: Sequence[No] = ()

    @property
    def padding(self) -> Answer:
        """Whether prompts of unequal length may be padded on the left and run as one batch."""
        return No("it takes sequences of equal length")

    @abc.abstractmethod
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs for the given inputs (absent ones get their defaults)."""

    @abc.abstractmethod
    def decoder(self, batch: int, capacity: int) -> Decoder:
        """A fresh generation of `batch` sequences of at most `capacity` positions.

        Raises BackendError if the program has no cache (pass kv_cache).
        """

    def details(self) -> dict[str, Any]:
        """What the report says about how it runs: threads, options, kernels by node."""
        return {}


class Backend(abc.ABC):
    """An ordered choice of kernels and lowering rules, and how to run or export the result."""

    name: ClassVar[str]
    kernels: ClassVar[tuple[Kernel, ...]] = ()

    def available(self) -> Answer:
        """True, or why this backend cannot be used here (a package that is missing, no GPU)."""
        return True

    @abc.abstractmethod
    def accepts(self, program: Program, node: fx.Node) -> Answer:
        """True if this backend can run `node`, or a No that names what it lacks."""

    @abc.abstractmethod
    def lower(self, program: Program, folder: Path | None = None) -> Runner:
        """Make the program runnable; files it needs are written to `folder` (or a temporary one)."""

    def tune(self, program: Program, progress: Callable[[str, int, int], None]) -> Path | No:
        """Measure which configurations of its kernels are fastest here; the file they are kept in."""
        return No(f"the backend {self.name} has nothing to tune")

    def load(self, program: Program, folder: Path) -> Runner:
        """Make a saved artifact runnable, from the files `lower` wrote there if it wrote any."""
        return self.lower(program, folder)


@dataclass
class Placement:
    """Which backend runs the program, and every refusal met on the way."""

    backend: Backend
    refusals: list[No] = field(default_factory=list)


def place(program: Program, backends: Sequence[Backend]) -> Placement:
    """The first of `backends` that takes every node; the refusals of those before it are kept.

    Raises BackendError if none does.
    """
    refusals: list[No] = []
    for backend in backends:
        found = list(refusals_of(program, backend))
        if not found:
            return Placement(backend, refusals)
        refusals += found
    shown = "; ".join(map(str, refusals[:3]))
    raise BackendError(f"no backend of {[b.name for b in backends]} can run this program: {shown}")


def refusals_of(program: Program, backend: Backend) -> Iterable[No]:
    """Why `backend` cannot run `program`: one No per refused node, or one if it is not available."""
    answer = backend.available()
    if isinstance(answer, No):
        yield answer.at(f"backend {backend.name}")
        return
    for node in program.graph.nodes:
        if node.op == "call_function":
            answer = backend.accepts(program, node)
            if isinstance(answer, No):
                yield No(f"{backend.name}: {answer.reason}", answer.where or node.name)
