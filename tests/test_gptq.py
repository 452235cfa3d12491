"""GPTQ against its definition: the layer objective ||WX - QX||^2, compared with rounding on the same grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler import data
from qcompiler.errors import ContractError, PassError, RecipeError
from qcompiler.ops import qc
from qcompiler.passes.gptq import (
    Candidate,
    Gptq,
    better,
    gptq,
    inverse_factor,
    objective,
    refit_scale,
    search_grid,
    solve,
)
from qcompiler.passes.rtn import Rtn
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from tests.programs import located, tiny_llama


def layer(rows: int = 24, columns: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs with a few loud channels."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(600, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    x[:, : columns // 16] *= 8
    return torch.randn(rows, columns, generator=random) * 0.05, x.T @ x / 600


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    grain=st.sampled_from(["g16", "g32", "g48", "channel", "tensor"]),
    symmetry=st.sampled_from(["sym", "asym"]),
    act_order=st.booleans(),
)
def test_never_worse_than_rounding(bits: int, grain: str, symmetry: str, act_order: bool) -> None:
    weight, h = layer()
    scheme = Scheme.parse(f"int{bits}:{grain}:{symmetry}")
    q, error = gptq(weight, h, scheme, act_order=act_order)
    mine, rounded = objective(weight, q, h), objective(weight, QTensor.quantize(weight, scheme), h)
    worse = mine.sum() > rounded.sum() if grain == "tensor" else (mine > rounded * (1 + 1e-5)).any()
    assert not bool(worse)
    assert 0 < error < 1


@pytest.mark.parametrize("bits", [3, 4])
def test_much_better_than_rounding_where_inputs_correlate(bits: int) -> None:
    """Fails if the method is replaced by round-to-nearest."""
    weight, h = layer()
    scheme = Scheme.parse(f"int{bits}:g16:asym")
    q, _ = gptq(weight, h, scheme)
    assert objective(weight, q, h).sum() < 0.5 * objective(weight, QTensor.quantize(weight, scheme), h).sum()


def test_activation_order_leaves_no_permutation() -> None:
    q, _ = gptq(*layer(), Scheme.parse("int4:g32:asym"), act_order=True)
    assert q.permutation is None
    assert q.scale.shape == (24, 3)  # 80 columns: groups of 32, 32 and 16


def test_refitted_scales_are_the_least_squares_ones() -> None:
    weight, h = layer()
    q = QTensor.quantize(weight, Scheme.parse("int3:g16:sym"))
    fitted = q.with_parts(scale=refit_scale(weight, h, q).float())
    nudged = fitted.with_parts(scale=fitted.scale * 1.01)
    assert bool((objective(weight, fitted, h) <= objective(weight, nudged, h)).all())
    assert objective(weight, fitted, h).sum() < objective(weight, q, h).sum()


def test_rows_choose_for_themselves() -> None:
    weight, h = layer()
    good, bad = (QTensor.quantize(weight, Scheme.parse(s)) for s in ("int4:g16:asym", "int4:g16:asym"))
    worse = bad.with_parts(scale=torch.where(torch.arange(24)[:, None] < 12, bad.scale * 3, bad.scale))
    chosen = better(*(Candidate(q, objective(weight, q, h)) for q in (worse, good)))
    assert bool((objective(weight, chosen.q, h) <= objective(weight, good, h)).all())
    assert torch.allclose(chosen.loss, objective(weight, chosen.q, h))


def test_symmetric_grids_turn_their_longer_side_to_the_larger_values() -> None:
    """Codes -8 to 7: values that reach further up than down are better held with the sign turned."""
    weight = torch.cat([torch.linspace(-0.85, 1, 32)[None], torch.linspace(-1, 0.85, 32)[None]])
    scheme = Scheme.parse("int4:g32:sym")
    scale, zero = search_grid(weight, torch.ones(32), scheme, clip=0.6)
    assert zero is None
    assert scale.sign().flatten().tolist() == [-1, 1]
    assert torch.equal(scale[0], -scale[1])
    h = torch.eye(32)
    q, _ = gptq(weight, h, scheme)
    assert objective(weight, q, h).sum() < 0.9 * objective(weight, QTensor.quantize(weight, scheme), h).sum()
    assert float(q.scale[0]) < 0 < float(q.scale[1])  # fitted scales keep their sign


def test_recursion_is_the_papers() -> None:
    """Algorithm 1 without blocks: round a column, spread its error over those left by the inverse's Cholesky factor."""
    weight, h = layer(columns=150)  # more than one block
    scheme = Scheme.parse("int3:g50:asym")
    scale, zero = search_grid(weight, h.diagonal(), scheme, clip=1.0)
    u, order = inverse_factor(h, 0.01, act_order=True)
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(150)).double()[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(u.double(), upper, rtol=1e-4, atol=1e-6)
    rest, codes = weight[:, order].double(), torch.empty(24, 150, dtype=torch.uint8)
    assert zero is not None
    for i, column in enumerate(order.tolist()):
        s, z = (part[:, column // 50].double() for part in (scale, zero))
        code = (torch.round(rest[:, i] / s) + z).clamp(0, 7)
        error = (rest[:, i] - (code - z) * s) / upper[i, i]
        rest[:, i:] -= error[:, None] * upper[i, i:]
        codes[:, column] = code.to(torch.uint8)
    found = solve(weight, u, order, scheme, scale, zero)
    assert float((found == codes).float().mean()) > 0.98  # single precision turns a few ties


def test_channels_that_never_speak_are_rounded() -> None:
    weight, h = layer()
    h[:, 5] = h[5, :] = 0
    q, _ = gptq(weight, h, Scheme.parse("int8:g16:asym"))
    assert (q.dequantize() - weight)[:, 5].abs().max() < 0.01


def test_singular_hessian_is_damped_until_it_is_not() -> None:
    weight, _ = layer()
    gptq(weight, torch.ones(80, 80), Scheme.parse("int4:g16"))


def samples(program: Program, seed: int) -> list[dict[str, Tensor]]:
    """Two batches of random ids."""
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 80, (16, 32), generator=random)} for _ in range(2)]


def quantized(step: Gptq | Rtn) -> tuple[Program, Runner]:
    """A tiny model after one pass."""
    program = located(tiny_llama())
    runner = Runner(Context(samples=samples(program, 1)), samples(program, 2))
    runner.run(program, [step])
    return program, runner


def test_pass_quantizes_every_layer_and_says_so() -> None:
    program, runner = quantized(Gptq(Scheme.parse("int4:g32:asym")))
    record = runner.records[0]
    assert len(record.layers) == 14
    assert all(layer.output_error is not None and layer.output_error < 0.2 for layer in record.layers)
    assert len(program.quantized) == 14


def test_pass_is_nearer_to_the_model_than_rounding() -> None:
    kl = {
        step.name: quantized(step)[1].records[0].kl
        for step in (Gptq(Scheme.parse("int3:g32:asym")), Rtn(Scheme.parse("int3:g32:asym")))
    }
    assert kl["gptq"] is not None
    assert kl["rtn"] is not None
    assert kl["gptq"] < kl["rtn"]


def test_same_seed_same_program() -> None:
    step = Gptq(Scheme.parse("int4:g32:asym"))
    assert quantized(step)[0].fingerprint() == quantized(step)[0].fingerprint()


def test_head_takes_the_tied_embedding_along() -> None:
    program, _ = quantized(Rtn(Scheme.parse("int8:g32"), include=("@head",)))
    assert list(program.quantized) == ["model.embed_tokens.weight"]
    assert len(list(program.calls(qc.linear))) == len(list(program.calls(qc.embedding))) == 1


def test_no_data_no_pattern_no_coverage() -> None:
    program = located(tiny_llama())
    with pytest.raises(PassError, match=r'pass "gptq".*needs calibration data'):
        Runner(Context(), data.check_samples(program)).run(program, [Gptq()])
    with pytest.raises(RecipeError, match=r'the pattern "\*\.nope" matches none of the 15 linear layers'):
        Runner(Context(), data.check_samples(program)).run(program, [Rtn(include=("*.nope",))])
    bad = [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]
    program.tensors["model.layers.0.input_layernorm.weight"] = torch.full((64,), float("inf"))
    with pytest.raises((ContractError, PassError), match="of 14 selected linear layers"):
        Runner(Context(samples=bad), []).run(program, [Gptq()])


def test_it_reads_the_first_samples_only() -> None:
    batches = [{"input_ids": torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(i))} for i in (1, 2)]
    programs = [located(tiny_llama()) for _ in range(2)]
    contexts = [Context(samples=batches), Context(samples=[{"input_ids": batches[0]["input_ids"][:3]}])]
    for program, context, count in zip(programs, contexts, (3, 0), strict=True):
        Runner(context, data.check_samples(program)).run(program, [Gptq(samples=count)])
    assert programs[0].fingerprint() == programs[1].fingerprint()
    assert contexts[0].samples is batches
