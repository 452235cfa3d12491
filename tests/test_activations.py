"""activations and kv: what is rounded, by which ranges, and what is said about it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from qcompiler import data
from qcompiler.errors import PassError, RecipeError
from qcompiler.ops import qc
from qcompiler.passes.activations import Activations
from qcompiler.passes.kv import Kv, at_every_position
from qcompiler.passes.ranges import RANGES, static_grid, statistic_of
from qcompiler.passes.statistics import Pair, Sampled, TokenPeaks
from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.program import Program, Type
from qcompiler.recipe import Recipe
from qcompiler.scheme import Scheme
from tests.programs import located, tiny_llama
from tests.test_canonicalize import canonical, random

STATIC = Scheme.parse("int8:tensor:asym")


def ran(program: Program, *steps: Pass, samples: list[dict[str, Tensor]] | None = None) -> Runner:
    found = data.check_samples(program) if samples is None else samples
    runner = Runner(Context(samples=found), found)
    runner.run(program, steps)
    return runner


def test_layers_that_share_an_input_share_its_codes() -> None:
    program = tiny_llama()
    runner = ran(program, Activations(include=("*",)))
    rounded = list(program.calls(qc.fake_quantize))
    assert len(rounded) == 9  # two layers of four each, and the head
    assert any(len(node.users) == 3 for node in rounded)
    assert "9 activations, read by 15 linear layers" in runner.records[0].notes[0]


def test_what_is_rounded_already_is_left() -> None:
    program = located(tiny_llama())
    runner = ran(
        program,
        *Recipe.parse("activations{include=@normed}, activations{scheme=int4:token:asym:dynamic}").passes,
    )
    assert any("its input is rounded already" in text for text in runner.records[1].refusals)
    schemes = [node.kwargs["scheme"] for node in program.calls(qc.fake_quantize)]
    assert schemes.count("int8:token:asym:dynamic") == schemes.count("int4:token:asym:dynamic") == 4


def test_quantized_layers_too_and_their_weights_stay() -> None:
    program = tiny_llama()
    runner = ran(program, *Recipe.parse("rtn{scheme=int8:g16}, activations{scheme=int8:g16:asym}").passes)
    assert all(node.args[0].target is qc.fake_quantize for node in program.calls(qc.linear))
    assert (runner.records[1].kl or 0) < 1e-3


@pytest.mark.parametrize("ranges", RANGES)
def test_ranges(ranges: str) -> None:
    """Each covers most of what is seen; only minmax covers all."""
    x = random(4096, 16)
    x[7, 3] = 40.0
    statistic = statistic_of(ranges)
    seen = statistic.done(statistic.step(statistic.step(statistic.start(), x[:2048]), x[2048:]))
    scale, _ = static_grid(seen, STATIC, ranges)
    assert (float(scale) * 255 > 40) == (ranges in ("minmax",)) or ranges == "average"
    assert float(scale) * 255 > 4


def test_an_unknown_range_is_named() -> None:
    with pytest.raises(RecipeError, match='ranges "median" is none of minmax, average, percentile, error'):
        statistic_of("median")


def test_samples_are_bounded_and_even() -> None:
    statistic, state = Sampled(rows=64), Sampled(rows=64).start()
    for chunk in torch.arange(5000.0)[:, None].split(77):
        state = statistic.step(state, chunk)
    kept = statistic.done(state)
    assert kept is not None
    assert 32 <= len(kept) <= 64
    steps = kept[1:] - kept[:-1]
    assert bool((steps == steps[0]).all())


def test_massive_activations_take_their_own_range() -> None:
    def function(weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight)

    inputs = {"x": random(4, 16, 32)}
    inputs["x"][0, 0, 5] = 900.0
    program, _ = canonical(function, inputs, weight=random(8, 32, seed=1))
    calm = {"x": random(4, 16, 32, seed=2)}
    expected = program(**calm)["out"]
    errors = {}
    for massive in (0.0, 10.0):
        copy = program.copy()
        runner = ran(copy, Activations(STATIC, massive=massive), samples=[inputs])
        errors[massive] = float((copy(**calm)["out"] - expected).norm() / expected.norm())
        assert any(
            "times the median one, no static range serves both" in r for r in runner.records[0].refusals
        ) == bool(massive)
    assert errors[10.0] < 0.1 * errors[0.0]


def test_peaks_and_pairs() -> None:
    pair = Pair(TokenPeaks(), Sampled(rows=4))
    x = torch.ones(10, 3)
    x[4] = 50
    excess, rows = pair.done(pair.step(pair.start(), x))
    assert excess == 50.0
    assert len(rows) <= 4


def test_static_ranges_need_data() -> None:
    program = tiny_llama()
    with pytest.raises(PassError, match="ranges of int8:tensor:asym need calibration data"):
        Runner(Context(), data.check_samples(program)).run(program, [Activations(STATIC)])


def test_keys_before_rotary() -> None:
    program = tiny_llama()
    ran(program, Kv(rotary="before"))
    ropes = list(program.calls(qc.rope))
    assert sum(node.args[0].target is qc.fake_quantize for node in ropes) == 2  # the keys of two layers
    with pytest.raises(RecipeError, match="block, recent, first and static schemes need rotary=after"):
        ran(tiny_llama(), Kv(rotary="before", first=4))


def test_static_keys_and_values_hold_a_scale_a_head() -> None:
    program = tiny_llama()
    runner = ran(program, *Recipe.parse("kv{key=int8:g4:asym value=int8:channel:sym}, kv_cache").passes)
    scales = {name: t.shape for name, t in program.tensors.items() if name.endswith("_scale")}
    assert set(scales.values()) == {torch.Size([2, 1, 4]), torch.Size([2, 1, 16])}
    assert (runner.records[0].kl or 0) < 1e-3


@pytest.mark.parametrize("ranges", ["minmax", "error"])
def test_static_ranges_of_keys_hold_at_later_positions(ranges: str) -> None:
    """Calibrated on the first positions, read at far ones: what was seen alone would clip."""
    base = tiny_llama()
    ids = torch.randint(0, 50, (8, 4), generator=torch.Generator().manual_seed(1))
    far = {"input_ids": ids, "position_ids": torch.arange(40, 44).expand(8, -1)}
    expected, errors = base(**far)["logits"], {}
    for widen in (False, True):
        program = base.copy()
        static = Kv(Scheme.parse("int8:channel:sym"), Scheme.parse("int8:channel:sym"), ranges=ranges, widen=widen)
        ran(program, static, samples=[{"input_ids": ids}])
        errors[widen] = float((program(**far)["logits"] - expected).norm() / expected.norm())
    assert errors[True] < 0.4 * errors[False], errors


@given(interleaved=st.booleans(), turned=st.sampled_from([4, 8]), extremes=st.booleans(), position=st.floats(0, 7))
def test_no_position_leaves_the_widened_range(interleaved: bool, turned: int, extremes: bool, position: float) -> None:
    graph = fx.Graph()
    x, cos = graph.placeholder("x"), graph.placeholder("cos")
    cos.meta["type"] = Type((1, 5, turned // 2), torch.float32)
    node = graph.call_function(qc.rope, (x, cos, cos), {"interleaved": interleaved})
    keys = random(1, 2, 5, 8)
    rows = keys[0].permute(1, 0, 2).flatten(1)  # [tokens, heads * d]
    seen = torch.stack([rows.amin(0), rows.amax(0)]) if extremes else rows
    wide = at_every_position(seen, node, heads=2)
    angle = torch.full((1, 5, turned // 2), position)
    later = qc.rope(keys, angle.cos(), angle.sin(), interleaved=interleaved)[0].permute(1, 0, 2).flatten(1)
    assert bool((later <= wide.amax(0) + 1e-5).all())
    assert bool((later >= wide.amin(0) - 1e-5).all())
    assert torch.equal(at_every_position(seen, x, heads=2), seen)


def test_attention_without_rotary_says_so() -> None:
    from tests.programs import tiny_encoder

    program = tiny_encoder()
    runner = ran(program, Kv(rotary="before"))
    assert any("its keys are not turned by rotary positions" in text for text in runner.records[0].refusals)
