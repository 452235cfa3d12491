"""SmoothQuant: exact by itself, and better than rounding alone where some channels are loud."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler import data
from qcompiler.calibration import measure
from qcompiler.compiler import compile
from qcompiler.errors import PassError, RecipeError
from qcompiler.evaluate import compare
from qcompiler.ops import qc
from qcompiler.passes.activations import Activations
from qcompiler.passes.rtn import Rtn
from qcompiler.passes.smoothquant import SmoothQuant
from qcompiler.passes.statistics import AbsMax
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.scheme import Scheme
from tests.programs import located, tiny_llama
from tests.test_awq import loud
from tests.test_canonicalize import canonical, random

ROUNDED = (Activations(Scheme.parse("int8:tensor:asym")), Rtn(Scheme.parse("int8:channel")))


def test_loud_channels_are_rounded_better() -> None:
    """Fails if the method is replaced by round-to-nearest."""
    program, inputs = loud()
    for name in ("gate", "up"):  # as in trained models: the loud channels are not the important ones
        program.tensors[name] = torch.where(program.tensors["norm"] > 1, 1 / 30, 1.0) * program.tensors[name]
    expected = program(**inputs)["out"]
    errors = {}
    for name, steps in {"rtn": ROUNDED, "smoothquant": (SmoothQuant(), *ROUNDED)}.items():
        copy = program.copy()
        Runner(Context(samples=[inputs]), [inputs]).run(copy, steps)
        errors[name] = float((copy(**inputs)["out"] - expected).norm() / expected.norm())
    assert errors["smoothquant"] < 0.2 * errors["rtn"], errors


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_ranges_are_shared_as_the_paper_says(alpha: float) -> None:
    """Afterwards max|x| is (max|x| max|w|) ^ (1 - alpha), and max|w| that product ^ alpha."""
    program, inputs = loud()
    gate = program.linears()[0]

    def ranges() -> tuple[Tensor, Tensor]:
        weights = torch.cat([program.tensors["gate"], program.tensors["up"]])
        return measure(program, [inputs], {gate.name: AbsMax()})[gate.name], weights.abs().amax(0)

    x, w = ranges()
    Runner(Context(samples=[inputs]), [inputs]).run(program, [SmoothQuant(alpha, exclude=("down",))])
    smooth_x, smooth_w = ranges()
    torch.testing.assert_close(smooth_x, (x * w) ** (1 - alpha))
    torch.testing.assert_close(smooth_w, (x * w) ** alpha)


def test_it_is_exact_by_itself_and_says_where_it_cannot_reach() -> None:
    program = tiny_llama()
    samples = data.check_samples(program)
    runner = Runner(Context(samples=samples), samples)
    runner.run(program, [SmoothQuant(include=("*",))])
    record = runner.records[0]
    assert record.changed
    assert record.output_change < 1e-4
    assert any("no factor can pass to what makes its channels" in text for text in record.refusals)


def gelu_between() -> tuple[Program, dict[str, Tensor]]:
    """Two linear layers, an activation function between them, and one hidden channel that is loud."""

    def function(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up)), down)

    up, down = random(24, 16, seed=1), random(12, 24, seed=2)
    up[5] *= 60
    down[:, 5] /= 60
    inputs = {"x": random(2, 40, 16)}
    return canonical(function, inputs, up=up, down=down)[0], inputs


def test_a_value_that_nothing_scales_is_multiplied_at_run_time() -> None:
    program, inputs = gelu_between()
    expected, errors = program(**inputs)["out"], []
    for explicit in (0.0, 4.0):
        copy = program.copy()
        runner = Runner(Context(samples=[inputs]), [inputs])
        runner.run(copy, [SmoothQuant(explicit=explicit)])
        assert len(list(copy.calls(torch.ops.aten.mul.Tensor))) == bool(explicit)
        torch.testing.assert_close(copy(**inputs)["out"], expected, rtol=1e-4, atol=1e-4)
        runner.run(copy, ROUNDED)
        errors.append(float((copy(**inputs)["out"] - expected).norm() / expected.norm()))
    assert errors[1] < 0.3 * errors[0], errors


def test_quiet_channels_are_not_multiplied() -> None:
    program, inputs = gelu_between()
    runner = Runner(Context(samples=[inputs]), [inputs])
    runner.run(program, [SmoothQuant(explicit=1000.0)])
    assert not list(program.calls(torch.ops.aten.mul.Tensor))
    assert any("none is loud enough to multiply at run time" in text for text in runner.records[0].refusals)


def test_a_weight_that_is_read_twice_is_not_scaled() -> None:
    """The layers multiply by one matrix; factors for what one of them reads would change the other."""

    def function(w: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w)), w)

    w = random(16, 16)
    w[3] *= 60
    inputs = {"x": random(2, 40, 16)}
    program, _ = canonical(function, inputs, w=w)
    runner = Runner(Context(samples=[inputs]), [inputs])
    runner.run(program, [SmoothQuant(explicit=1.5)])
    assert not runner.records[0].changed
    assert any("no factor can pass to what makes its channels" in text for text in runner.records[0].refusals)


def test_channels_that_are_always_zero_stay() -> None:
    def function(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, up), down)

    up = random(12, 8, seed=1)
    up[5] = 0.0
    program, _ = canonical(function, {"x": random(2, 5, 8)}, up=up, down=random(6, 12, seed=2))
    before = program.tensors["down"]
    Runner(Context([{"x": random(2, 5, 8)}]), [{"x": random(2, 5, 8)}]).run(program, [SmoothQuant()])
    changed = (program.tensors["down"] != before).any(0)
    assert changed.tolist() == [i != 5 for i in range(12)]


def test_mistakes_are_said() -> None:
    program, inputs = loud()
    with pytest.raises(PassError, match="needs calibration data"):
        Runner(Context(), [inputs]).run(program, [SmoothQuant()])
    with pytest.raises(RecipeError, match=r"from 0 to 1, not 1\.5"):
        Runner(Context([inputs]), [inputs]).run(program, [SmoothQuant(1.5)])


def test_the_named_recipe_compiles_a_decoder() -> None:
    program = located(tiny_llama())
    program.info |= {"vocab_size": 80}
    session = compile(program, "smoothquant-w8a8", samples=4, length=16, backend="reference")
    assert session.report.all_refusals == []
    assert session.report.coverage["quantized"] == session.report.coverage["linears"] == 9
    # One product of codes for each of: query, key and value; output; gate and up; down. Two layers.
    assert len(list(session.program.calls(qc.integer_linear))) == 8
    ids = torch.randint(80, (128,), generator=torch.Generator().manual_seed(1))
    found = compare(session, lambda window: program(input_ids=window)["logits"], ids, length=32)
    assert found.kl is not None
    assert found.kl < 0.01
