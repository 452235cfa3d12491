"""Equalization: channel ranges become equal on both sides, and one grid for a whole weight then does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler import data
from qcompiler.frontends import onnx as frontend
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.equalize import Equalize, ranges
from qcompiler.passes.rtn import Rtn
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.report import PassRecord
from qcompiler.scheme import QTensor, Scheme
from qcompiler.sites import Kind, find
from qcompiler.testing import assert_conforms
from tests.programs import tiny_llama
from tests.test_canonicalize import canonical, random
from tests.test_onnx_frontend import silero

INT8 = Scheme.parse("int8:tensor:asym")


def uneven(*weights: Tensor) -> list[Tensor]:
    """Weights whose channels differ a hundredfold between one and the next, and the function does not show it."""
    found = list(weights)
    for i in range(len(found) - 1):
        factors = 10 ** torch.linspace(-1, 1, found[i].shape[0])[torch.randperm(found[i].shape[0])]
        found[i] = found[i] * factors.view(-1, *[1] * (found[i].dim() - 1))
        found[i + 1] = found[i + 1] / factors.view(1, -1, *[1] * (found[i + 1].dim() - 2))
    return found


def mlp() -> tuple[Program, dict[str, Tensor]]:
    """Three linear layers with biases and relu between them."""

    def function(a: Tensor, abias: Tensor, b: Tensor, bbias: Tensor, c: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, a, abias)), b, bbias)), c)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b, c = uneven(random(48, 32, seed=1), random(40, 48, seed=2), random(16, 40, seed=3))
    inputs = {"x": random(4, 16, 32, seed=4)}
    return canonical(function, inputs, a=a, b=b, c=c, abias=a[:, 0], bbias=random(40, seed=5))[0], inputs


def cnn() -> tuple[Program, dict[str, Tensor]]:
    """A convolution, one for each channel, and one over all of them: a block of MobileNet, without its clips."""

    def function(a: Tensor, abias: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
        h = F.conv2d(F.relu(F.conv2d(x, a, abias)), b, padding=1, groups=24)
        return F.conv2d(F.relu(h), c)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        factors = 10 ** (2 * torch.rand(2, 24, 1, 1, 1) - 1)
    a, b, c = random(24, 6, 1, 1, seed=1), random(24, 1, 3, 3, seed=2), random(9, 24, 1, 1, seed=3)
    a, b, c = a * factors[0], b / factors[0] * factors[1], c / factors[1].view(1, 24, 1, 1)
    inputs = {"x": random(4, 6, 8, 8, seed=4)}
    return canonical(function, inputs, {"x": {0: "batch"}}, a=a, b=b, c=c, abias=a[:, 0, 0, 0])[0], inputs


def run(program: Program, inputs: dict[str, Tensor], *steps: Equalize | Rtn) -> PassRecord:
    runner = Runner(Context(), [inputs])
    runner.run(program, steps)
    return runner.records[0]


def round_all(program: Program) -> None:
    """Every matrix and filter on one 8-bit grid of its own."""
    for name, weight in list(program.tensors.items()):
        if weight.dim() > 1:
            rounded = QTensor.quantize(weight.flatten(1), INT8).dequantize()
            program.tensors[name] = rounded.view(weight.shape)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_one_grid_a_weight_loses_less(make: Callable[[], tuple[Program, dict[str, Tensor]]]) -> None:
    """Fails if the method is replaced by nothing."""
    program, inputs = make()
    expected = program(**inputs)["out"]
    errors = {}
    for equalized in (False, True):
        copy = program.copy()
        if equalized:
            assert run(copy, inputs, Equalize()).output_change < 1e-4
        round_all(copy)
        errors[equalized] = float((copy(**inputs)["out"] - expected).norm() / expected.norm())
    assert errors[True] < 0.1 * errors[False], errors


@pytest.mark.parametrize("make", [mlp, cnn])
def test_ranges_are_equal_on_both_sides_of_every_site(make: Callable[[], tuple[Program, dict[str, Tensor]]]) -> None:
    program, inputs = make()
    record = run(program, inputs, Equalize())
    assert record.notes == []
    sites = [site for site in find(program, Kind.SCALE) if all(bool(side.any()) for side in ranges(program, site))]
    assert len(sites) == 2
    for site in sites:
        made, read = ranges(program, site)
        torch.testing.assert_close(made, read, rtol=2e-3, atol=0)


def test_two_layers_get_the_factors_of_the_paper() -> None:
    a, b = uneven(random(6, 4, seed=1), random(3, 6, seed=2))
    inputs = {"x": random(2, 5, 4)}
    program, _ = canonical(lambda a, b, x: F.linear(F.relu(F.linear(x, a)), b), inputs, a=a, b=b)
    run(program, inputs, Equalize())
    r1, r2 = a.abs().amax(1), b.abs().amax(0)
    s = (r1 * r2).sqrt() / r2
    torch.testing.assert_close(program.tensors["a"], a / s[:, None])
    torch.testing.assert_close(program.tensors["b"], b * s)


def test_a_channel_without_weights_stays_as_it_is() -> None:
    a, b = random(6, 4, seed=1), random(3, 6, seed=2)
    a[2] = 0.0
    inputs = {"x": random(2, 5, 4)}
    program, _ = canonical(lambda a, b, x: F.linear(F.relu(F.linear(x, a)), b), inputs, a=a, b=b)
    run(program, inputs, Equalize())
    assert torch.equal(program.tensors["b"][:, 2], b[:, 2])


def test_too_few_rounds_are_said() -> None:
    program, inputs = mlp()
    assert "the last of 1 rounds still changed" in run(program, inputs, Equalize(rounds=1)).notes[0]


def test_a_decoder_is_equalized_where_weights_meet() -> None:
    """Queries with keys, values with the output projection, up with down; a norm's output has one side only."""
    program = tiny_llama()
    runner = Runner(Context(), data.check_samples(program))
    runner.run(program, [Equalize()])
    record = runner.records[0]
    assert record.changed
    assert record.output_change < 1e-4
    assert sum("no weights on both sides of its channels" in text for text in record.refusals) == 4
    assert any("aten.silu acts on each channel alone and is not homogeneous" in text for text in record.refusals)
    for site in find(program, Kind.SCALE):
        made, read = ranges(program, site)
        assert not made.any() or torch.allclose(made, read, rtol=2e-3)


def test_an_onnx_model_is_equalized() -> None:
    """Four convolutions of silero-vad with relu between them; a recurrent layer reads the last."""
    program = frontend.capture(silero("silero_vad_16k_sequence.onnx"))
    inputs = {"input": random(4, 576) / 10, "h": torch.zeros(1, 1, 128), "c": torch.zeros(1, 1, 128)}
    runner = Runner(Context(), [inputs])
    runner.run(program, [Canonicalize(), Equalize()])
    record = runner.records[-1]
    assert [str(site) for site in find(program, Kind.SCALE)] == [
        f"scale {size} channels: encoder.{i}.weight rows, encoder.{i}.bias, encoder.{i + 1}.weight columns"
        for i, size in enumerate([128, 64, 64])
    ]
    assert record.changed
    assert record.output_change < 1e-5
    for site in find(program, Kind.SCALE):
        torch.testing.assert_close(*ranges(program, site), rtol=2e-3, atol=0)


def test_it_conforms() -> None:
    assert_conforms(Equalize())
