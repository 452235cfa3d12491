"""AWQ: exact by itself, and better than rounding alone where some channels are loud."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler import data
from qcompiler.errors import PassError
from qcompiler.passes.awq import Awq
from qcompiler.passes.rtn import Rtn
from qcompiler.passes.smoothquant import SmoothQuant
from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.program import Program
from qcompiler.scheme import Scheme
from tests.programs import tiny_llama
from tests.test_canonicalize import canonical, random

SCHEME = Scheme.parse("int3:g32:asym")


def loud() -> tuple[Program, dict[str, Tensor]]:
    """A norm whose weight makes three of 64 channels loud, read by two linear layers."""

    def function(norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (64,), norm, 1e-5)
        return F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

    norm = torch.ones(64)
    norm[[3, 17, 40]] = 30.0
    weights = {"gate": random(48, 64, seed=1) / 8, "up": random(48, 64, seed=2) / 8, "down": random(64, 48, seed=3) / 7}
    inputs = {"x": random(4, 16, 64, seed=4)}
    return canonical(function, inputs, norm=norm, **weights)[0], inputs


def test_loud_channels_are_rounded_better() -> None:
    """Fails if the method is replaced by round-to-nearest."""
    program, inputs = loud()
    expected = program(**inputs)["out"]
    errors = {}
    for name, steps in {"rtn": [Rtn(SCHEME)], "awq": [Awq(SCHEME), Rtn(SCHEME)]}.items():
        copy = program.copy()
        Runner(Context(samples=[inputs]), [inputs]).run(copy, steps)
        errors[name] = float((copy(**inputs)["out"] - expected).norm() / expected.norm())
    assert errors["awq"] < 0.7 * errors["rtn"], errors


def test_it_is_exact_by_itself_and_says_where_it_cannot_reach() -> None:
    program = tiny_llama()
    samples = data.check_samples(program)
    runner = Runner(Context(samples=samples), samples)
    runner.run(program, [Awq(SCHEME, include=("*",))])
    record = runner.records[0]
    assert record.changed
    assert record.output_change < 1e-4
    assert any("no factor can pass to what makes its channels" in text for text in record.refusals)


@pytest.mark.parametrize("subject", [Awq(SCHEME), SmoothQuant()], ids=str)
def test_channels_may_be_read_beside_others(subject: Pass) -> None:
    """A layer reads them alone, another with more channels before them."""

    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor) -> Tensor:
        y = F.linear(x, a)
        return F.linear(y, c) + F.linear(torch.cat([F.linear(x, b), y], -1), d)

    weights = {"a": random(32, 16), "b": random(24, 16, seed=1), "c": random(8, 32, seed=2), "d": random(8, 56, seed=3)}
    inputs = {"x": random(4, 16, 16, seed=4)}
    program, _ = canonical(function, inputs, **weights)
    runner = Runner(Context(samples=[inputs]), [inputs])
    runner.run(program, [subject])
    assert runner.records[0].output_change < 1e-4
    assert all(not torch.equal(program.tensors[name], weights[name]) for name in weights)


def test_it_needs_data() -> None:
    program, inputs = loud()
    with pytest.raises(PassError, match="needs calibration data"):
        Runner(Context(), [inputs]).run(program, [Awq()])
