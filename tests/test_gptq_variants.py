"""gptq's variants: weights moved to make up for inputs that drifted, and tokens that count for more."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompiler import calibration, data
from qcompiler.calibration import Segment
from qcompiler.errors import RecipeError
from qcompiler.execution import execute
from qcompiler.journal import Journal
from qcompiler.ops import qc
from qcompiler.passes.curvature import Side, measure
from qcompiler.passes.gptq import corrected, gptq, inverse_factor
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.scheme import Scheme
from tests.programs import located, tiny_llama

aten = torch.ops.aten
LOUD = 40  # of the 80 tokens that `loud` knows


def drifted(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs of the float model that correlate, and what earlier layers in low bits made of them."""
    random = torch.Generator().manual_seed(seed)
    exact = torch.randn(800, 48, generator=random) @ torch.randn(48, 48, generator=random)
    return torch.randn(24, 48, generator=random) * 0.05, exact, (exact / 6).round() * 6


def test_the_correction_is_the_least_squares_fit() -> None:
    weight, exact, x = drifted()
    hessian, drift = x.T @ x / 800, (exact - x).T @ x / 800
    found = corrected(weight, drift, inverse_factor(hessian, 1e-9, act_order=True), strength=1.0)
    expected = torch.linalg.lstsq(x.double(), (exact @ weight.T).double()).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert not torch.allclose(found, weight, atol=1e-3)
    half = corrected(weight, drift, inverse_factor(hessian, 1e-9, act_order=False), strength=0.5)
    assert torch.allclose(half, (found + weight) / 2, atol=1e-4)


def test_a_corrected_layer_gives_more_nearly_what_the_float_model_has() -> None:
    weight, exact, x = drifted()
    hessian, drift = x.T @ x / 800, (exact - x).T @ x / 800
    moved = corrected(weight, drift, inverse_factor(hessian, 0.01, act_order=True), strength=1.0)
    wanted = exact @ weight.T
    errors = [
        float((x @ gptq(start, hessian, Scheme.parse("int4:g16:asym"))[0].dequantize().T - wanted).norm())
        for start in (weight, moved)
    ]
    assert errors[1] < 0.9 * errors[0]


def samples(seed: int, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of random ids."""
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 80, (8, 32), generator=random)} for _ in range(count)]


def loud() -> Program:
    """A model where half of the tokens are a hundred times as large as the others, which use other channels."""
    program = located(tiny_llama(layers=3, tied=False))
    name = "model.embed_tokens.weight"
    table = program.tensors[name].clone()
    table[:LOUD, 32:], table[LOUD:, :32] = 0, 0
    table[:LOUD] *= 100
    program.tensors[name] = table
    return program


def ran(base: Program, recipe: str, journal: Journal | None = None) -> Program:
    program = base.copy()
    context = Context(samples=samples(1), journal=journal or Journal())
    Runner(context, data.check_samples(program)).run(program, Recipe.parse(recipe).passes)
    return program


def distance(program: Program, base: Program) -> float:
    """The relative error of logits of texts that were not calibrated on."""
    ids = samples(2)[0]["input_ids"]
    found, expected = (p(input_ids=ids)["logits"] for p in (program, base))
    return float((found - expected).norm() / expected.norm())


def test_relative_importance_leaves_out_tokens_that_errors_do_not_change() -> None:
    base = loud()
    plain, weighed = (
        ran(base, f"gptq{{scheme=int3:g32:asym include=*.mlp.*{more}}}") for more in ("", " importance=relative")
    )
    assert distance(weighed, base) < 0.9 * distance(plain, base)


def test_correction_brings_the_program_nearer_to_the_float_one() -> None:
    """Where activations are rounded, whose errors a plain Hessian knows nothing of."""
    base = located(tiny_llama(layers=3))
    rough = "activations{scheme=int4:token:asym:dynamic}, "
    plain, moved = (ran(base, f"{rough}gptq{{scheme=int4:g32:asym correction={c}}}") for c in (0, 0.5))
    assert any(moved.calls(qc.fake_quantize))
    assert distance(moved, base) < distance(plain, base)


@pytest.mark.parametrize("importance", ["", "relative", "attention"])
def test_what_is_measured_is_what_it_says(importance: str) -> None:
    """Hessians and drifts of the second block's layers, against sums over its tokens."""
    base, texts = loud(), samples(3, count=2)
    rough = base.copy()
    name = "model.layers.0.mlp.down_proj.weight"
    rough.tensors[name] = (rough.tensors[name] * 4).round() / 4
    sweeps = [calibration.sweep(program, texts, lambda nodes: {}) for program in (rough, base)]
    segment, twin = next(pair for pair in zip(*sweeps, strict=True) if pair[0].index == 2)
    layers = [node for node in segment.nodes if node.target is aten.linear.default]
    hessians, drifts = measure(Side(rough, segment), Side(base, twin), texts, layers, importance)
    assert len({id(hessian) for hessian in hessians.values()}) == 4  # of what q, k, v read, o, gate and up, down
    runs = [(everything(rough, text), everything(base, text)) for text in texts]
    for layer in layers:
        source = str(layer.args[0])
        roots = [weights(segment, seen, importance).sqrt()[..., None] for seen, _ in runs]
        x = torch.cat([seen[source] * root for (seen, _), root in zip(runs, roots, strict=True)]).flatten(0, 1)
        exact = torch.cat([seen[source] * root for (_, seen), root in zip(runs, roots, strict=True)]).flatten(0, 1)
        for found, expected in ((hessians, x.T @ x), (drifts, (exact - x).T @ x)):
            value = found[layer.name]
            assert value is not None
            assert float((value - expected / len(x)).norm() / value.norm()) < 1e-4


def everything(program: Program, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every value of a run by the name of its node."""
    seen: dict[str, Tensor] = {}
    execute(list(program.calls()), program.bind(sample), program.tensors, lambda n, v: seen.update({n.name: v}))
    return seen


def weights(segment: Segment, seen: dict[str, Tensor], importance: str) -> Tensor:
    """The weights of tokens, [batch, tokens], by definition."""
    if importance == "relative":
        end = [node for node in segment.nodes if node.target is aten.add.Tensor][-1]
        return 1 / seen[end.name].square().mean(-1)
    if importance == "attention":
        node = next(node for node in segment.nodes if node.target is qc.attention)
        q, k = (seen[str(argument)] for argument in node.args[:2])
        scores = q @ k.repeat_interleave(2, dim=1).mT * 0.25
        past = torch.ones(32, 32, dtype=torch.bool).tril()
        return scores.masked_fill(~past, -torch.inf).softmax(-1).sum((1, 2))
    return torch.ones(8, 32)


def test_a_run_that_died_goes_on_with_the_same_result(tmp_path: Path) -> None:
    base, recipe = loud(), "gptq{scheme=int3:g32:asym importance=relative correction=0.5}"
    whole = ran(base, recipe, Journal(tmp_path))
    pages = sorted(tmp_path.iterdir())
    pages[-1].unlink()
    assert ran(base, recipe, Journal(tmp_path)).fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("importance=loudness", 'importance "loudness" is none of relative, attention'),
        ("correction=2", "correction=2: it is a share of the way, 0 to 1"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ran(loud(), f"gptq{{{options}}}")
