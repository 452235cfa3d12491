"""RPTQ: clusters in whole groups, an exact reordering without gathers, and less error than without it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler import data
from qcompiler.errors import No, PassError, RecipeError
from qcompiler.ops import qc
from qcompiler.passes.activations import Activations
from qcompiler.passes.clusters import assign, cluster, whole_groups
from qcompiler.passes.kv import Kv
from qcompiler.passes.rptq import Rptq
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.scheme import Scheme
from tests.programs import tiny_encoder, tiny_llama
from tests.test_canonicalize import canonical, random

aten = torch.ops.aten


def test_similar_channels_come_together_in_whole_groups() -> None:
    sizes = torch.tensor([1.0, 50.0, 1.1, 49.0, 1.2, 51.0, 0.9, 52.0])
    order = cluster(torch.stack([-sizes, sizes], -1), clusters=2, group=4)
    assert isinstance(order, Tensor)
    assert set(order[:4].tolist()) == {0, 2, 4, 6}


@given(
    channels=st.integers(2, 12),
    group=st.sampled_from([1, 2, 4, 8]),
    clusters=st.integers(1, 20),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=30)
def test_an_order_holds_every_channel_once(channels: int, group: int, clusters: int, seed: int) -> None:
    points = random(channels * group, 2, seed=seed)
    order = cluster(points, clusters, group)
    assert isinstance(order, Tensor)
    assert order.sort().values.tolist() == list(range(channels * group))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=9), st.sampled_from([4, 16]))
def test_rounded_sizes_keep_their_sum(sizes: list[int], group: int) -> None:
    padded = np.array([*sizes, -sum(sizes) % group + group * len(sizes)])
    rounded = whole_groups(padded, group)
    assert rounded.sum() == padded.sum()
    assert (rounded % group == 0).all()
    assert (rounded > 0).all()


def test_full_clusters_send_channels_to_the_next() -> None:
    distance = np.array([[0.0, 9.0], [1.0, 2.0], [0.0, 5.0], [0.5, 8.0]])
    labels = assign(distance, np.array([2, 2]))
    assert np.bincount(labels).tolist() == [2, 2]
    assert labels[0] == 0  # it would lose most
    assert labels[1] == 1  # it loses least


def test_what_cannot_be_grouped_says_so() -> None:
    answer = cluster(random(6, 2), 4, 4)
    assert isinstance(answer, No)
    assert "6 channels are not two or more groups of 4" in str(answer)
    assert isinstance(cluster(torch.zeros(8, 2), 4, 2), Tensor)  # channels that are all the same


def uneven() -> tuple[Program, dict[str, Tensor]]:
    """Every fourth channel of a norm is loud, and every third of the MLP: what reads them weighs them down."""

    def function(norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (64,), norm, 1e-5)
        return F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

    norm = torch.ones(64)
    norm[::4] = 20.0
    up = random(96, 64, seed=2) / 8
    up[::3] *= 30
    down = random(64, 96, seed=3) / 9
    down[:, ::3] /= 30
    weights = {"gate": random(96, 64, seed=1) / 8 / norm, "up": up / norm, "down": down}
    inputs = {"x": random(4, 16, 64, seed=4)}
    return canonical(function, inputs, norm=norm, **weights)[0], inputs


def test_groups_of_reordered_channels_lose_less() -> None:
    """Fails if the method is replaced by doing nothing."""
    program, inputs = uneven()
    expected = program(**inputs)["out"]
    errors = {}
    rounding = Activations(Scheme.parse("int4:g16:asym"))
    for name, steps in {"plain": [rounding], "rptq": [Rptq(group=16), rounding]}.items():
        copy = program.copy()
        Runner(Context(samples=[inputs]), [inputs]).run(copy, steps)
        errors[name] = float((copy(**inputs)["out"] - expected).norm() / expected.norm())
    assert errors["rptq"] < 0.5 * errors["plain"], errors


def test_it_is_exact_and_adds_no_gather() -> None:
    for build in (tiny_llama, tiny_encoder):
        program = build()
        samples = data.check_samples(program)
        before = {target: len(list(program.calls(target))) for target in (aten.index_select.default, aten.index.Tensor)}
        runner = Runner(Context(samples=samples), samples)
        runner.run(program, [Rptq(group=4)])
        record = runner.records[0]
        assert record.changed
        assert record.output_change < 1e-4
        assert before == {target: len(list(program.calls(target))) for target in before}


def test_each_norm_of_a_decoder_stores_its_own_order() -> None:
    program = tiny_llama()
    samples = data.check_samples(program)
    Runner(Context(samples=samples), samples).run(program, [Rptq(group=4)])
    orders = [program.tensors[name] for name in program.tensors if name.endswith(".order")]
    assert len(orders) == len(list(program.calls(qc.reordered_norm))) > 3
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


def test_one_order_for_the_residual_stream_needs_no_such_norms() -> None:
    program = tiny_llama()
    samples = data.check_samples(program)
    before = program.tensors["model.embed_tokens.weight"]
    runner = Runner(Context(samples=samples), samples)
    runner.run(program, [Rptq(group=4, norms="residual")])
    assert not list(program.calls(qc.reordered_norm))
    assert not torch.equal(program.tensors["model.embed_tokens.weight"], before)
    assert runner.records[0].output_change < 1e-4


def test_the_plan_has_the_same_operators() -> None:
    program, planned = tiny_llama(), tiny_llama()
    samples = data.check_samples(program)
    Runner(Context(samples=samples), samples).run(program, [Rptq(group=4)])
    Runner(Context(), samples).run(planned, [Rptq(group=4).plan()])
    assert program.text() == planned.text()


def test_the_whole_recipe_walks() -> None:
    program = tiny_llama()
    samples = data.check_samples(program)
    recipe = (
        "rptq{group=8 head_group=4}, activations{scheme=int8:g8:asym}, kv{key=int4:g4:asym value=int4:g4:asym}, "
        "gptq{scheme=int4:g8:asym}, fuse, kv_cache, pack"
    )
    runner = Runner(Context(samples=samples), samples)
    runner.run(program, Recipe.parse(recipe).passes)
    assert [text for record in runner.records for text in record.refusals] == []
    assert program.caches


def test_bad_options_and_no_data() -> None:
    program = tiny_llama()
    samples = data.check_samples(program)
    with pytest.raises(PassError, match="needs calibration data"):
        Runner(Context(), samples).run(program, [Rptq()])
    with pytest.raises(RecipeError, match="none of store, residual"):
        Runner(Context(samples=samples), samples).run(program, [Rptq(norms="gather")])
    with pytest.raises(PassError, match="static ranges of keys and values need calibration data"):
        Runner(Context(), samples).run(program, [Kv(key=Scheme.parse("int8:g8:asym"))])
