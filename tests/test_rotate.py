"""Rotations: exact on every kind of model, and outliers go away."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler import data
from qcompiler.comparison import in_double
from qcompiler.errors import RecipeError
from qcompiler.ops import qc
from qcompiler.passes.activations import Activations
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.kv import Kv
from qcompiler.passes.open_norms import norms, passed
from qcompiler.passes.rotate import Rotate
from qcompiler.pipeline import Context, Pass, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.report import PassRecord
from qcompiler.scheme import Scheme
from qcompiler.testing import assert_conforms
from tests.programs import tiny_encoder, tiny_llama
from tests.test_canonicalize import canonical, random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

aten = torch.ops.aten
EMBEDDING = "model.embed_tokens.weight"


def rotated(program: Program, step: Rotate = Rotate(), seed: int = 0) -> PassRecord:  # noqa: B008 - it is frozen
    """Run the pass on the program, held to its contract."""
    samples = data.check_samples(program)
    runner = Runner(Context(seed=seed), samples)
    runner.run(program, [step])
    return runner.records[0]


def exactly(program: Program, step: Rotate = Rotate()) -> PassRecord:  # noqa: B008
    """The same in double precision, where nothing but rounding to 1e-12 may be left."""
    record = rotated(in_double(program), step)
    assert record.output_change is not None
    assert record.output_change < 1e-12
    return record


# -- exact -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"tied": False}, {"qk_norm": True}, {"bias": True}, {"hidden": 72}, {"window": 3, "sinks": True}]
)
def test_a_decoder(options: dict) -> None:
    record = exactly(tiny_llama(**options))
    hidden = options.get("hidden", 64)
    assert f"rotated by weights alone: 1 x residual, {hidden} channels" in record.notes
    assert "rotated by weights alone: 2 x heads, 2 x 16 channels" in record.notes
    assert not record.refusals


def test_what_is_left() -> None:
    """All norms are ones, every weight that holds the stream is another, a rotation of what it was."""
    program = tiny_llama(tied=False)
    before = dict(program.tensors)
    rotated(program)
    assert passed(program) == norms(program)
    for name, tensor in before.items():
        if "norm" in name:
            assert bool((program.tensors[name] == 1).all())
        elif "inv_freq" not in name:
            assert (program.tensors[name] - tensor).abs().max() > 0.1
    rows = before[EMBEDDING].norm(dim=1)
    torch.testing.assert_close(program.tensors[EMBEDDING].norm(dim=1), rows)


def test_the_seed_decides() -> None:
    programs = [tiny_llama() for _ in range(3)]
    for program, seed in zip(programs, (0, 0, 1), strict=True):
        rotated(program, seed=seed)
    first, again, other = (program.fingerprint() for program in programs)
    assert first == again != other


def test_a_tied_head_gets_a_weight_of_its_own() -> None:
    program = tiny_llama(tied=True)
    size = program.tensors[EMBEDDING].nbytes
    record = rotated(program)
    assert f"{EMBEDDING} is no longer tied: {EMBEDDING}_untied is a copy of its own, 0.0 MB more" in record.notes
    assert program.nbytes == tiny_llama(tied=True).nbytes + size


def test_a_size_without_a_hadamard_matrix() -> None:
    record = exactly(tiny_llama(hidden=92))
    assert any("92 channels, no Hadamard matrix of that size: a random rotation" in note for note in record.notes)


def test_half_precision_stays_half() -> None:
    def function(embed: Tensor, norm: Tensor, mix: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        x = F.embedding(ids, embed)
        wide = x.float()
        h = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        return F.linear(x + F.linear(h, mix), head)

    shapes = {"embed": (30, 16), "norm": (16,), "mix": (16, 16), "head": (30, 16)}
    weights = {name: random(*shape, seed=i).bfloat16() / 4 for i, (name, shape) in enumerate(shapes.items())}
    ids = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    program, _ = canonical(function, {"ids": ids}, **weights)
    runner = Runner(Context(), [{"ids": ids}])
    runner.run(program, [Rotate()])
    assert "rotated by weights alone: 1 x residual, 16 channels" in runner.records[0].notes
    assert {tensor.dtype for tensor in program.tensors.values()} == {torch.bfloat16}


FAMILIES = {  # what is rotated
    "gpt2": ["residual", "qk", "heads"],  # LayerNorm, tied embeddings, a fused matrix, no rotary positions
    "cohere": ["residual", "heads"],  # LayerNorm, a norm for each head, parallel blocks, tied embeddings
    "mixtral": ["residual", "heads"],  # experts read the stream
    "opt": ["residual", "qk", "heads"],  # LayerNorm, learned positions
    "bloom": ["residual", "qk", "heads"],  # a norm of the embeddings
    "gpt_neox": ["residual", "heads"],  # parallel blocks with two norms
    "falcon": ["residual", "heads"],  # one key for all heads
    "phi": ["residual", "heads"],  # partial rotary positions
    "qwen3": ["residual", "heads"],  # query and key norms
    "gemma2": ["heads"],  # norms that write the stream have weights
    "olmo2": ["heads"],  # so do these
    "bert": ["qk", "heads"],  # norms after the sums
}
QUICK = ("gpt2", "cohere", "gemma2")


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_families(family: str) -> None:
    from tiny_models import tiny_model

    from qcompiler.frontends.huggingface import capture

    program = capture(tiny_model(family))
    Runner(Context(), data.check_samples(program)).run(program, [Canonicalize()])
    exactly(program, ONLINE)
    record = exactly(program)
    found = [note.partition(" x ")[2].partition(",")[0] for note in record.notes if note.startswith("rotated")]
    assert found == FAMILIES[family]
    assert bool(record.refusals) == ("residual" not in found)


# -- norms -----------------------------------------------------------------------------------------------------


WEIGHTS = {"first": random(16, 10, seed=1), "last": random(7, 16, seed=3)}
BIASED = {"weight": random(16, seed=4), "bias": random(16, seed=5)}
INPUTS = {"x": random(2, 5, 10, seed=6)}


def layer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, (16,), weight, bias, 1e-3)


def small(norm: Callable[..., Tensor], **parameters: Tensor) -> tuple[Program, PassRecord]:
    """A function of two layers and a norm, rotated."""
    program, _ = canonical(norm, INPUTS, **parameters)
    double = {name: value.double() for name, value in INPUTS.items()}
    program, runner = in_double(program), Runner(Context(), [double])
    runner.run(program, [Rotate()])
    assert (runner.records[0].output_change or 0.0) < 1e-12  # None: unchanged
    return program, runner.records[0]


def test_zero_and_negative_weights_fold() -> None:
    def function(first: Tensor, last: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(F.linear(x, first), (16,), weight, 1e-3), last)

    weight = random(16, seed=4)
    weight[3] = 0.0
    assert bool((weight < 0).any())
    program, record = small(function, **WEIGHTS, weight=weight)
    assert record.notes == ["rotated by weights alone: 1 x residual, 16 channels"]
    assert passed(program) == norms(program)


def test_negative_weights_do_not_pass_relu() -> None:
    def function(first: Tensor, last: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.rms_norm(F.linear(x, first), (16,), weight, 1e-3)), last)

    _, record = small(function, **WEIGHTS, weight=random(16, seed=4))
    assert any("its weight multiplies what more than linear layers read" in text for text in record.refusals)


def test_a_layer_norm_becomes_an_rms_norm() -> None:
    """Weight and bias move on, the mean moves back; the last layer had no bias, and gets one."""

    def function(first: Tensor, last: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return F.linear(layer(F.linear(x, first), weight, bias), last)

    program, record = small(function, **WEIGHTS, **BIASED)
    assert [node.target for node in norms(program)] == [aten.rms_norm.default]
    assert record.notes == ["rotated by weights alone: 1 x residual, 16 channels"]
    assert program.tensors["last.bias"].shape == (7,)


def test_a_norm_of_an_embedding_is_taken_of_its_table() -> None:
    """As in BLOOM, whose stream begins with a norm."""

    def function(table: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, ids: Tensor) -> Tensor:
        x = layer(F.embedding(ids, table), weight, bias)
        return F.linear(layer(x + F.linear(layer(x), mix)), table)

    ids = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    weights = {"table": random(30, 16, seed=1), "mix": random(16, 16, seed=2), **BIASED}
    program, _ = canonical(function, {"ids": ids}, **weights)
    program, runner = in_double(program), Runner(Context(), [{"ids": ids}])
    runner.run(program, [Rotate()])
    assert (runner.records[0].output_change or 0.0) < 1e-12
    assert "rotated by weights alone: 1 x residual, 16 channels" in runner.records[0].notes
    assert [node.target for node in norms(program)] == [aten.rms_norm.default] * 2


CLOSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "something else reads the mean": (
        lambda first, last, x: F.linear(layer(F.linear(x, first)), last) + F.linear(F.linear(x, first), last),
        "more than such norms reads its input",
    ),
    "another norm lies between": (
        lambda first, last, x: F.linear(layer(F.rms_norm(F.linear(x, first), (16,), None, 1e-3)), last),
        "more than such norms reads its input",
    ),
}


@pytest.mark.parametrize("what", CLOSED)
def test_a_mean_that_stays(what: str) -> None:
    """One stream, read with its mean, or normed before it is centered: the LayerNorm stays, and says why."""
    function, reason = CLOSED[what]

    def shared(first: Tensor, last: Tensor, x: Tensor) -> Tensor:
        return function(first, last, x)

    program, record = small(shared, **WEIGHTS)
    assert any(node.target is aten.layer_norm.default for node in norms(program))
    assert any(reason in text for text in record.refusals)


def test_one_stream_opens_and_one_does_not() -> None:
    def function(first: Tensor, last: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        passing = F.linear(F.rms_norm(F.linear(x, first), (16,), weight, 1e-3), last)
        return passing + F.rms_norm(passing, (7,), torch.ones(7), 1e-3)

    _, record = small(function, **WEIGHTS, weight=random(16, seed=4))
    assert "rotated by weights alone: 1 x residual, 16 channels" in record.notes
    [reason] = record.refusals
    assert "another operator makes or reads its input that they do not pass" in reason


def test_an_encoder_with_norms_after_the_sums() -> None:
    """Its stream is not rotated; what its attention reads and gives is."""
    record = exactly(tiny_encoder())
    assert [note for note in record.notes if "residual" in note] == []
    assert any("embeddings.norm" in text or "layer_norm" in text for text in record.refusals)
    assert "rotated by weights alone: 1 x heads, 4 x 8 channels" in record.notes


# -- what it is for --------------------------------------------------------------------------------------------


def loud() -> Program:
    """A decoder whose stream has two loud channels; what reads them weighs them little."""
    program = tiny_llama(layers=1, hidden=256, tied=False)
    for name, tensor in program.tensors.items():
        if tensor.dim() == 2 and tensor.shape[1] == 256:
            factors = torch.ones(256)
            factors[[3, 17]] = 40.0 if name == EMBEDDING else 1 / 40
            program.tensors[name] = tensor * factors * (16.0 if name == EMBEDDING else 1.0)
    return program


def errors_of(program: Program, recipes: Mapping[str, Sequence[Pass]]) -> dict[str, float]:
    """The relative error of the logits after each of some recipes."""
    samples = data.check_samples(program)
    expected, errors = program(**samples[0])["logits"], {}
    for name, steps in recipes.items():
        copy = program.copy()
        Runner(Context(), samples).run(copy, steps)
        errors[name] = float((copy(**samples[0])["logits"] - expected).norm() / expected.norm())
    return errors


def test_outliers_go_away() -> None:
    """Fails if nothing is rotated, or only heads are."""
    program = loud()
    readers = ("*q_proj*", "*k_proj*", "*v_proj*", "*gate*", "*up*")
    rounding = Activations(Scheme.parse("int4:token:asym:dynamic"), include=readers)
    rounded, rotated = errors_of(program, {"rounded": [rounding], "rotated": [Rotate(), rounding]}).values()
    assert rotated < 0.5 * rounded, (rotated, rounded)


def test_what_comes_after_it() -> None:
    """The other passes find a rotated program as they find any."""
    program = tiny_llama()
    samples = data.check_samples(program)
    text = "rotate, awq{scheme=int4:g32}, gptq{scheme=int4:g32}, fuse, kv_cache, pack"
    runner = Runner(Context(samples=samples), samples)
    runner.run(program, Recipe.parse(text).passes)
    by_name = {record.name: record for record in runner.records}
    assert [record.name for record in runner.records if not record.changed] == ["pack"]  # the codes are packed already
    assert not any("no factor can pass" in reason and "q_proj" in reason for reason in by_name["awq"].refusals)
    assert program.caches


# -- by an operator --------------------------------------------------------------------------------------------

ONLINE = Rotate(online=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["qk, 16 channels", "hidden, 96 channels"]),
        ({"rotary": 8, "head_dim": 12, "mlp": 88}, ["qk, 12 channels", "hidden, 88 channels"]),
        ({"mlp": 86, "qk_norm": True}, ["qk, 16 channels", "hidden, 86 channels in blocks of 2"]),
    ],
)
def test_where_no_weights_absorb_it(options: dict, expected: list[str]) -> None:
    """Both queries and keys, after their rotary positions; each MLP's hidden channels."""
    program = in_double(tiny_llama(**options))
    record = rotated(program, ONLINE)
    assert record.output_change is not None
    assert record.output_change < 1e-12
    assert record.notes[-2:] == [f"rotated by qc.hadamard: 2 x {what}" for what in expected]
    assert len(list(program.calls(qc.hadamard))) == 6
    assert not record.refusals


def test_it_is_said_where_an_operator_would_be_needed() -> None:
    notes = exactly(tiny_llama()).notes
    assert "only online=true rotates: 2 x qk, 16 channels" in notes
    assert "only online=true rotates: 2 x hidden, 96 channels" in notes


def test_an_odd_number_of_channels() -> None:
    record = exactly(tiny_llama(mlp=95), ONLINE)
    assert any("no Hadamard matrix divides 95 channels" in text for text in record.refusals)


def test_a_weight_that_is_used_elsewhere() -> None:
    def function(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, up)), down) + F.linear(x, down)

    program, _ = canonical(function, {"x": random(2, 5, 10)}, up=random(10, 10), down=random(7, 10))
    runner = Runner(Context(), [{"x": random(2, 5, 10)}])
    runner.run(program, [ONLINE])
    assert any("its weight is also used elsewhere" in text for text in runner.records[0].refusals)


def test_hidden_outliers_go_away() -> None:
    """Fails if the operator is left out: a loud channel between the layers of an MLP."""
    program = tiny_llama(layers=1, mlp=256, tied=False)
    factors = torch.ones(256)
    factors[3] = 20.0
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    program.tensors[up], program.tensors[down] = program.tensors[up] * factors[:, None], program.tensors[down] / factors
    rounding = Activations(Scheme.parse("int4:token:asym:dynamic"), include=("*down_proj*",))
    folded, online = errors_of(program, {"folded": [Rotate(), rounding], "online": [ONLINE, rounding]}).values()
    assert online < 0.7 * folded, (online, folded)


def test_loud_keys_go_away() -> None:
    """Fails if the operator is left out: a pair of channels that is loud in the keys and quiet in the queries."""
    program = tiny_llama(layers=1, hidden=32, heads=1, kv_heads=1, head_dim=64, tied=False)
    factors = torch.ones(64, 1)
    factors[[30, 62]] = 20.0
    query, key = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    program.tensors[query], program.tensors[key] = program.tensors[query] / factors, program.tensors[key] * factors
    rounding = Kv(Scheme.parse("int4:token:asym:dynamic"), Scheme.parse("int8:token:asym:dynamic"))
    folded, online = errors_of(program, {"folded": [Rotate(), rounding], "online": [ONLINE, rounding]}).values()
    assert online < 0.5 * folded, (online, folded)


def test_it_goes_on_from_a_cache() -> None:
    program = tiny_llama()
    samples = data.check_samples(program)
    runner = Runner(Context(samples=samples), samples)
    runner.run(program, Recipe.parse("rotate{online=true}, gptq{scheme=int4:g32}, fuse, kv_cache").passes)
    assert program.caches
    assert not runner.records[-1].refusals


def test_it_conforms() -> None:
    assert_conforms(Rotate, tiny_llama(), tiny_encoder())
    assert_conforms(ONLINE, tiny_llama(), tiny_encoder())


def test_options() -> None:
    record = rotated(tiny_llama(), Rotate(sites=("heads",)))
    assert record.notes == ["rotated by weights alone: 2 x heads, 2 x 16 channels"]
    with pytest.raises(RecipeError, match='there is no site "head"; did you mean "heads"'):
        Recipe.parse("rotate{sites=head}")
    record = rotated(tiny_llama(), Rotate(sites=("qk",)))
    assert record.refusals == ["no weights absorb a rotation, at any of qk"]
