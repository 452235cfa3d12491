"""kquant: less error than llama.cpp's own quantizer at the same size, its mixtures, importance matrices."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import InputError, No, PassError, RecipeError
from qcompiler.formats import gguf_types
from qcompiler.formats.imatrix import Imatrix
from qcompiler.passes.kquant import KQuant, measured
from qcompiler.passes.kquant_mixtures import MIXTURES, Place, fitting, mixture
from qcompiler.passes.kquant_search import Levels, fit_line, fit_scale
from qcompiler.passes.kquant_types import TYPES, quantize
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import build
from tests.programs import tiny_llama

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

COLUMNS = 512


def weight_of(seed: int, tails: float = 0.0, rows: int = 24) -> Tensor:
    """Normal weights, or some whose tails are those of a t distribution."""
    chance = np.random.default_rng(seed)
    values = chance.standard_t(tails, (rows, COLUMNS)) if tails else chance.normal(0, 1, (rows, COLUMNS))
    return torch.from_numpy(values.astype(np.float32)) * 0.04


def importance_of(seed: int) -> Tensor:
    return torch.from_numpy(np.exp(np.random.default_rng(seed).normal(0, 1.5, COLUMNS)).astype(np.float32))


def loss(weight: Tensor, values: Tensor, importance: Tensor | None = None) -> float:
    squares = (weight - values).double().square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("weighed", [False, True])
def test_no_more_error_than_llama_cpp_at_the_same_size(kind: str, weighed: bool) -> None:
    from tests.llama_cpp import quantized

    ratios = []
    for seed, tails in ((0, 0.0), (1, 0.0), (2, 5.0), (3, 3.0)):
        weight, importance = weight_of(seed, tails), importance_of(seed) if weighed else None
        ours = quantize(weight, kind, importance)
        answer = gguf_types.encode(ours)
        assert isinstance(answer, tuple)
        assert answer[0] == kind
        theirs = quantized(weight.numpy(), kind, None if importance is None else importance.numpy())
        ratio = loss(weight, ours.dequantize(), importance) / loss(weight, torch.from_numpy(theirs), importance)
        assert ratio < 1.01, (tails, ratio)
        ratios.append(ratio)
    assert np.mean(ratios) < 1


def nearest(weight: Tensor, kind: str) -> Tensor:
    """Plain rounding to the grid from each group's smallest to its largest value, with unrounded scales: no search."""
    scheme = gguf_types.KINDS[kind].scheme
    x = weight.unflatten(1, (-1, scheme.group_size))
    if gguf_types.KINDS[kind].codebook is not None:
        book = torch.tensor(gguf_types.KINDS[kind].codebook)
        place = x.abs().argmax(-1, keepdim=True)
        scale = x.gather(-1, place) / book[0]
        return (book[(x / scale).unsqueeze(-1).sub(book).abs().argmin(-1)] * scale).flatten(1)
    if gguf_types.KINDS[kind].minima:
        low = x.amin(-1, keepdim=True)
        scale = (x.amax(-1, keepdim=True) - low) / (scheme.levels - 1)
        return (torch.round((x - low) / scale) * scale + low).flatten(1)
    scale = x.abs().amax(-1, keepdim=True) / (scheme.levels // 2 - 0.5)
    half = scheme.levels // 2
    return (torch.round(x / scale).clamp(-half, half - 1) * scale).flatten(1)


@pytest.mark.parametrize("kind", TYPES)
def test_the_search_beats_rounding_to_nearest(kind: str) -> None:
    """Even where rounding may keep its scales in full precision, and this may not."""
    weight = weight_of(7, 4.0)
    assert loss(weight, quantize(weight, kind).dequantize()) < 0.97 * loss(weight, nearest(weight, kind))


@pytest.mark.parametrize("kind", TYPES)
def test_the_importance_is_heeded(kind: str) -> None:
    weight, importance = weight_of(3), importance_of(3)
    weighed = loss(weight, quantize(weight, kind, importance).dequantize(), importance)
    assert weighed < 0.97 * loss(weight, quantize(weight, kind).dequantize(), importance)


@pytest.mark.parametrize("kind", TYPES)
@example(seed=425, exponent=-3, flat=True)  # scales of scales that float16 would take for zero
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-3, 3), flat=st.booleans())
def test_any_weights_are_held(kind: str, seed: int, exponent: int, flat: bool) -> None:
    """Constant rows, zeros and lone values too; the error is within a step of the range."""
    weight = weight_of(seed, 2.0, rows=3) * 10.0**exponent
    weight[0] = weight[0, 0] if flat else 0
    weight[1, 1:] = 0
    record = quantize(weight, kind)
    values = record.dequantize()
    assert values.shape == weight.shape
    assert bool(torch.isfinite(values).all())
    assert loss(weight, values) <= 0.3 * float(weight.double().square().sum())
    answer = gguf_types.encode(record)
    assert isinstance(answer, tuple)
    decoded = gguf.dequantize(answer[1].numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(decoded, values.numpy())


def test_a_scale_is_the_best_there_is() -> None:
    """Against all scales, tried one by one."""
    chance = torch.Generator().manual_seed(0)
    x, w, levels = torch.randn(40, 16, generator=chance), torch.rand(40, 16, generator=chance), Levels(-4, 3)
    found = fit_scale(x, w, levels)

    def lost(scale: Tensor) -> Tensor:
        steps = levels.nearest(x / scale[:, None])
        return (w * (x - steps * scale[:, None]).square()).sum(-1)

    grid = torch.linspace(-2, 2, 4001)
    best = torch.stack([lost(s.expand(40)) for s in grid[grid != 0]]).amin(0)
    assert float(lost(found).sum() / best.sum()) < 1.02
    ends = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0] / -4
    assert float(lost(found).sum() / lost(ends).sum()) < 0.9


def test_a_minimum_is_never_above_zero_where_it_may_not_be() -> None:
    x = torch.rand(50, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    ones = torch.ones_like(x)
    assert bool((fit_line(x, ones, 15, below=True).minimum <= 0).all())
    assert bool((fit_line(x, ones, 15, below=False).minimum > 0).all())


def test_books_are_looked_up_exactly() -> None:
    from qcompiler.formats.gguf_blocks import IQ4

    values, book = torch.linspace(-140, 130, 100_001), torch.tensor(IQ4)
    distance = (Levels(IQ4[0], IQ4[-1], IQ4).nearest(values.clone()) - values).abs()
    assert torch.equal(distance, (values[:, None] - book).abs().amin(1))


def test_refused_weights() -> None:
    with pytest.raises(InputError, match=r"Q4_K stores matrices with rows of whole blocks of 256, not \[2, 64\]"):
        quantize(torch.zeros(2, 64), "Q4_K")
    with pytest.raises(InputError, match="NaN or infinite"):
        quantize(torch.full((2, 256), torch.nan), "Q4_K")
    with pytest.raises(InputError, match="beyond what float16 scales can say"):
        quantize(torch.full((2, 256), 1e9), "Q4_0")
    with pytest.raises(InputError, match="negative or not finite"):
        quantize(torch.ones(2, 256), "Q4_K", -torch.ones(256))


def quantized(program: Program, ctx: Context | None = None, **options: str) -> tuple[Program, Context]:
    program, ctx = program.copy(), ctx or Context()
    build("kquant", options).run(program, ctx)
    program.clean()
    program.verify()
    return program, ctx


@pytest.fixture(scope="module")
def model() -> Program:
    return tiny_llama(layers=8, hidden=256, heads=8, kv_heads=4, head_dim=32, mlp=512, vocabulary=96, tied=False)


def kinds(program: Program) -> dict[str, str]:
    return {name: str(gguf_types.kind_of(program.qtensor(name))) for name in program.quantized}


def test_a_mixture_gives_more_bits_to_what_needs_them(model: Program) -> None:
    program, _ = quantized(model, type="q4_k_m")
    found = kinds(program)
    assert found["lm_head.weight"] == "Q6_K"
    assert found["model.embed_tokens.weight"] == "Q4_K"
    assert [found[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(8)] == [
        "Q6_K" if i in (0, 3, 6, 7) else "Q4_K" for i in range(8)
    ]
    assert found["model.layers.3.self_attn.v_proj.weight"] == "Q6_K"
    assert found["model.layers.3.self_attn.q_proj.weight"] == "Q4_K"
    assert program.info["gguf_mixture"] == "Q4_K_M"


def test_one_type_for_all(model: Program) -> None:
    program, _ = quantized(model, type="q5_k")
    assert set(kinds(program).values()) == {"Q5_K"}


def test_patterns(model: Program) -> None:
    program, ctx = quantized(model, type="q4_k", include="*mlp*", exclude="*down*")
    assert {name.split(".")[-2] for name in program.quantized} == {"gate_proj", "up_proj"}
    assert any("excluded by the recipe" in text for text in ctx.record.refusals)


def test_rows_that_are_no_superblocks_get_the_type_that_stands_in() -> None:
    program, _ = quantized(tiny_llama(), type="q4_k_m")
    assert set(kinds(program).values()) <= {"Q5_0", "Q8_0"}
    answer = fitting("Q4_K", 40)
    assert isinstance(answer, No)
    assert "no multiple of 32" in answer.reason


def test_unknown_type() -> None:
    with pytest.raises(RecipeError, match='kquant has no type "q4_k_x"; did you mean "Q4_K_'):
        mixture("q4_k_x")


def test_importance_is_measured_or_read(model: Program, tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    samples = [{"input_ids": torch.randint(0, 96, (2, 24), generator=chance)} for _ in range(3)]
    by_data = model.copy()
    runner = Runner(Context(samples=samples), samples[:1])
    runner.run(by_data, [KQuant(type="q4_k_m", imatrix="calibration")])
    matrix = measured(model, samples, "somewhere/text.txt")
    assert (matrix.datasets, matrix.chunks, matrix.chunk_size) == (("text.txt",), 3, 48)
    assert set(matrix.counts.values()) == {144.0}
    for name in ("matrix.gguf", "matrix.dat"):
        matrix.write(tmp_path / name)
        by_file, ctx = quantized(model, type="q4_k_m", imatrix=str(tmp_path / name))
        for stored in by_file.quantized:
            weight, values = model.tensors[stored], by_file.qtensor(stored).dequantize()
            expected = loss(weight, by_data.qtensor(stored).dequantize())
            assert loss(weight, values) == pytest.approx(expected, rel=1e-2)
            # The other format holds rounded means, and the last bit of a mean may decide a tie.
            assert name == "matrix.dat" or _same(by_file, by_data, stored), stored
        assert [text for text in ctx.record.refusals if "no entry" in text] == [
            "model.embed_tokens.weight: the importance matrix has no entry for it: all its channels count alike"
        ]
    plain, _ = quantized(model, type="q4_k_m")
    assert not _same(plain, by_data, "model.layers.0.mlp.down_proj.weight")


def _same(one: Program, other: Program, name: str) -> bool:
    return torch.equal(one.qtensor(name).dequantize(), other.qtensor(name).dequantize())


def test_importance_of_channels_is_their_mean_square(model: Program) -> None:
    ids = torch.arange(20).view(1, 20)
    matrix = measured(model, [{"input_ids": ids}])
    first = next(node for node in model.linears() if "q_proj" in str(node.args[1]))
    from qcompiler.execution import execute

    env = model.bind({"input_ids": ids})
    seen = []
    execute(model.graph.nodes, env, model.tensors, lambda node, v: seen.append(v) if node is first.args[0] else None)
    expected = seen[0].flatten(0, 1).square().mean(0)
    torch.testing.assert_close(matrix.means["blk.0.attn_q.weight"], expected)


def test_no_data_is_an_error(model: Program) -> None:
    with pytest.raises(PassError, match='"kquant" needs calibration data'):
        Runner(Context(), []).run(model.copy(), [KQuant(imatrix="calibration")])


def test_an_importance_matrix_of_another_model_is_refused(model: Program, tmp_path: Path) -> None:
    Imatrix({"blk.0.attn_q.weight": torch.ones(7)}, {"blk.0.attn_q.weight": 1.0}).write(tmp_path / "m.gguf")
    _, ctx = quantized(model, type="q4_k", imatrix=str(tmp_path / "m.gguf"))
    assert any("has 7 channels, not 256" in text for text in ctx.record.refusals)


def test_mixtures_as_text(golden: Callable[[str, str], None]) -> None:
    """Of a model of 32 blocks, two query heads to a key head; benchmarks/formats.py compares with llama.cpp's files."""
    roles = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_down")
    lines = []
    for name in MIXTURES:
        lines.append(name)
        for role in roles:
            found = Counter(str(mixture(name).kind(Place(role, i, 32, 2), 4096)) for i in range(32))
            lines.append(f"  {role}: " + ", ".join(f"{kind} x {n}" for kind, n in found.items()))
    golden("kquant_mixtures", "\n".join(lines))
