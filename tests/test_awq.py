"""AWQ: exact by itself, and better than rounding alone where some channels are loud."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler import data
from qcompiler.errors import PassError, RecipeError
from qcompiler.passes.awq import Awq, AwqClip, clipped
from qcompiler.passes.rtn import Rtn
from qcompiler.passes.smoothquant import SmoothQuant
from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
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


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(3, 40),
    size=st.sampled_from([4, 8, 16]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clipping_finds_the_best_range_of_each_group(
    rows: int, columns: int, size: int, symmetric: bool, seed: int
) -> None:
    """Against the paper's code in its own words: one group, one range after another, on activations."""
    weight, x = random(rows, columns, seed=seed) ** 3, random(50, columns, seed=seed + 1)
    weight += weight.sign() / 10  # no scale so small that it takes 32 bits to store, whatever the group
    scheme = Scheme.parse(f"int3:g{size}:{'sym' if symmetric else 'asym'}")
    found = clipped(weight, x.T @ x / len(x), scheme, 0.5, 5)
    for start in range(0, columns, size):
        inputs, group, kept = (t[:, start : start + size] for t in (x, weight, found))
        errors = []
        for step in range(6):
            share = 1 - step / 10
            low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
            errors.append(output_error(group.clamp(low * share, high * share), group, inputs, scheme))
        torch.testing.assert_close(
            output_error(kept, group, inputs, scheme), torch.stack(errors).amin(0), rtol=1e-3, atol=1e-6
        )


def output_error(candidate: Tensor, group: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """The mean squared error of each row's output, [rows]."""
    rounded = QTensor.quantize(candidate, scheme).dequantize()
    return (x @ (rounded - group).T).square().mean(0)


def test_clipping_helps_where_a_weight_stands_out() -> None:
    """Fails if the method is replaced by round-to-nearest."""
    program, inputs = loud()
    weight = program.tensors["down"].clone()
    weight[::4, 5] *= 6
    program.tensors["down"] = weight
    expected = program(**inputs)["out"]
    errors = {}
    for name, steps in {"rtn": [Rtn(SCHEME)], "clip": [AwqClip(SCHEME), Rtn(SCHEME)]}.items():
        copy = program.copy()
        Runner(Context(samples=[inputs]), [inputs]).run(copy, steps)
        errors[name] = float((copy(**inputs)["out"] - expected).norm() / expected.norm())
    assert errors["clip"] < 0.9 * errors["rtn"], errors


def test_a_range_for_the_whole_tensor_is_refused() -> None:
    program, inputs = loud()
    with pytest.raises(RecipeError, match="ranges are clipped by row; write channel or a group size"):
        Runner(Context(samples=[inputs]), [inputs]).run(program, [AwqClip(Scheme.parse("int4:tensor"))])


@pytest.mark.parametrize("subject", [Awq(), AwqClip()], ids=str)
def test_it_needs_data(subject: Pass) -> None:
    program, inputs = loud()
    with pytest.raises(PassError, match="needs calibration data"):
        Runner(Context(), [inputs]).run(program, [subject])
