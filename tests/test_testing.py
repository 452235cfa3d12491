"""The conformance kit passes what is right and names what is wrong with what is not."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from qcompiler.errors import No, PassError
from qcompiler.passes.awq import Awq
from qcompiler.passes.block_tune import BlockTune
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.kv_cache import KvCache
from qcompiler.passes.pack import Pack
from qcompiler.passes.rtn import Rtn
from qcompiler.passes.smoothquant import SmoothQuant
from qcompiler.pipeline import Context, Contract, Pass
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from qcompiler.testing import Outcome, assert_conforms, check_pass
from tests.programs import tiny_llama

G32 = Scheme.parse("int4:g32:asym")


@pytest.mark.parametrize(
    "subject",
    [
        Rtn(),
        Rtn(G32),
        Gptq(G32),
        Gptq(Scheme.parse("int3:channel:asym")),
        BlockTune(G32, steps=3),
        Awq(G32),
        SmoothQuant(),
        Pack(),
        Fuse(),
    ],
    ids=str,
)
def test_built_in_passes_conform(subject: Pass) -> None:
    assert_conforms(subject)


def test_given_programs_are_tried() -> None:
    """A pass for language models acts on none of the kit's own programs; it refuses them."""
    alone = {o.check: o for o in check_pass(KvCache)}
    assert not alone["3-D activations"].failure
    assert_conforms(KvCache, tiny_llama(layers=1))


def round_all(program: Program, noise: Callable[[torch.Tensor], torch.Tensor] = lambda w: w) -> None:
    """Round all weights of linear layers, after something was done to them."""
    for name in dict.fromkeys(str(node.args[1].target) for node in program.linears()):
        program.quantize_tensor(name, QTensor.quantize(noise(program.tensors[name]), G32))


@dataclass(frozen=True)
class Lossy(Pass):
    """The frame of the broken passes."""

    name: ClassVar[str] = "lossy"
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, program: Program, ctx: Context) -> None:
        round_all(program)


@dataclass(frozen=True)
class WritesInPlace(Lossy):
    """Behind PyTorch's back, too."""

    def run(self, program: Program, ctx: Context) -> None:
        for node in program.linears():
            program.tensors[str(node.args[1].target)].data.mul_(0.5)
        round_all(program)


@dataclass(frozen=True)
class DrawsFromTheGlobalState(Lossy):
    """Two runs differ."""

    def run(self, program: Program, ctx: Context) -> None:
        round_all(program, lambda w: w + torch.randn_like(w) * 0.1)


@dataclass(frozen=True)
class SetsTheSeed(Lossy):
    """Two runs are the same, at the caller's cost."""

    def run(self, program: Program, ctx: Context) -> None:
        random.seed(0)
        torch.manual_seed(0)
        round_all(program, lambda w: w + torch.randn_like(w) * 0.1)


@dataclass(frozen=True)
class ClaimsToBeExact(Lossy):
    """Rounds."""

    contract: ClassVar[Contract] = Contract.EXACT


@dataclass(frozen=True)
class DividesByTheRange(Lossy):
    """Has a range of zero to divide by."""

    def run(self, program: Program, ctx: Context) -> None:
        for name in dict.fromkeys(str(node.args[1].target) for node in program.linears()):
            w = program.tensors[name]
            program.tensors[name] = (w - w.min()) / (w.max() - w.min())


@dataclass(frozen=True)
class KnowsThreeDimensions(Lossy):
    """Crashes on two."""

    def run(self, program: Program, ctx: Context) -> None:
        for node in program.linears():
            _batch, _sequence, _channels = node.args[0].meta["type"].shape
        round_all(program)


@dataclass(frozen=True)
class SaysNothing(Lossy):
    """Does nothing, either."""

    def run(self, program: Program, ctx: Context) -> None:
        pass


@dataclass(frozen=True)
class RefusesWithoutReason(Lossy):
    """Has none to give."""

    def run(self, program: Program, ctx: Context) -> None:
        ctx.refuse(No(""))


@dataclass(frozen=True)
class NeedsDataSecretly(Lossy):
    """Reads data that it did not ask for."""

    def run(self, program: Program, ctx: Context) -> None:
        round_all(program, lambda w: w * ctx.samples[0].keys().__len__())


@dataclass(frozen=True)
class ClaimsToNeedData(Lossy):
    """Reads none."""

    @property
    def uses_data(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("subject", "check", "words"),
    [
        (WritesInPlace, "3-D activations", "in place"),
        (DrawsFromTheGlobalState, "determinism", "two runs with one seed differ"),
        (DrawsFromTheGlobalState, "global state", "torch's random state"),
        (SetsTheSeed, "global state", "torch's random state, Python's random state"),
        (ClaimsToBeExact, "3-D activations", "declared exact"),
        (DividesByTheRange, "constant weights", "no longer finite"),
        (KnowsThreeDimensions, "2-D activations", "ValueError: not enough values"),
        (SaysNothing, "3-D activations: a reason", "refused nothing"),
        (RefusesWithoutReason, "3-D activations", "without a reason"),
        (NeedsDataSecretly, "without calibration data", "IndexError"),
        (ClaimsToNeedData, "without calibration data", "it runs without data"),
        (ClaimsToNeedData, "plan", "needs data"),
    ],
)
def test_broken_passes_fail(subject: type[Pass], check: str, words: str) -> None:
    before = torch.get_rng_state(), random.getstate()
    outcomes = {o.check: o for o in check_pass(subject)}
    assert words in outcomes[check].failure
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    with pytest.raises(AssertionError, match="FAIL"):
        assert_conforms(subject)


def test_a_declaration_without_its_parts() -> None:
    class Bare(Lossy):
        name: ClassVar[str] = "two words"

    outcomes = {o.check: o for o in check_pass(Bare())}
    assert "@dataclass(frozen=True)" in outcomes["frozen dataclass"].failure
    assert 'not "two words"' in outcomes["name"].failure
    assert outcomes["docstring"].failure


def test_a_refusal_is_not_a_failure() -> None:
    @dataclass(frozen=True)
    class Picky(Lossy):
        """Takes two dimensions only."""

        def run(self, program: Program, ctx: Context) -> None:
            if program.inputs[0].type.rank == 3:
                raise PassError("it takes activations of two dimensions only")
            round_all(program)

    outcomes = check_pass(Picky)
    assert Outcome("3-D activations", skipped='pass "lossy": it takes activations of two dimensions only') in outcomes
    assert not [o for o in outcomes if o.failure]
    assert str(next(o for o in outcomes if o.check == "recipe text")).startswith("recipe text: skip: no installed")
