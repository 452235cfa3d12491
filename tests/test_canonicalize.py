"""canonicalize: each spelling of an operator becomes that operator, and computes the same."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from qcompiler.frontends.exporting import export
from qcompiler.ops import qc
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.patterns.simplify import merge_equal
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.rewrite import arguments, op_name
from tests.programs import BS, Sketch

aten = torch.ops.aten
EPS = 1e-3


class Spelled(nn.Module):
    """A function of inputs and of this module's parameters, which the function gets first."""

    def __init__(self, function: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = list(parameters)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.function(**{name: getattr(self, name) for name in self.names}, **inputs)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def capture(module: nn.Module, inputs: Mapping[str, Tensor], sizes: Mapping[str, Mapping[int, str]]) -> Program:
    """The raw program of a module with one output, `out`."""
    return export(module, inputs, sizes, lambda given: {"out": module(**given)})


def canonical(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, Mapping[int, str]] | None = None,
    **parameters: Tensor,
) -> tuple[Program, Runner]:
    """The canonical program of a function, checked by its contract and against the function itself."""
    module = Spelled(function, **parameters)
    named = {name: {0: "batch", 1: "sequence"} for name in inputs} if sizes is None else sizes
    program = capture(module, inputs, named)
    runner = canonicalized(program, inputs)
    torch.testing.assert_close(program(**inputs)["out"], module(**inputs), atol=2e-5, rtol=2e-4)
    return program, runner


def canonicalized(program: Program, inputs: Mapping[str, Tensor]) -> Runner:
    runner = Runner(Context(), [inputs])
    runner.run(program, [Canonicalize()])
    return runner


def ops_of(program: Program) -> Counter[str]:
    return Counter(op_name(node) for node in program.calls() if node.target is not aten.sym_size.int)


# -- norms -----------------------------------------------------------------------------------------------------

RMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "llama": lambda w, x: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),
    "x * x": lambda w, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w,
    "square": lambda w, x: torch.rsqrt(EPS + x.square().mean(-1, keepdim=True)) * x * w,
    "dimension 2": lambda w, x: w * (x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + EPS)),
    "divided by the root": lambda w, x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "reciprocal": lambda w, x: w * (x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))),
    "power": lambda w, x: w * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5)),
    "functional": lambda w, x: F.rms_norm(x, (8,), w, EPS),
    "gemma": lambda w, x: (
        x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w.float())
    ).type_as(x),
}


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norms(spelling: str) -> None:
    program, _ = canonical(RMS[spelling], {"x": random(2, 5, 8)}, w=random(8, seed=1))
    assert ops_of(program) == {"rms_norm": 1}
    (norm,) = program.calls()
    weight = program.tensor_of(norm.args[2])
    assert weight is not None
    assert norm.args[1] == [8]
    assert norm.args[3] == EPS


def test_one_plus_the_weight_is_stored_under_the_name_of_the_weight() -> None:
    weight = random(8, seed=1)
    program, _ = canonical(RMS["gemma"], {"x": random(2, 5, 8)}, w=weight)
    assert set(program.tensors) == {"w_folded"}
    assert torch.equal(program.tensors["w_folded"], 1 + weight)


def test_an_rms_norm_without_weight() -> None:
    program, _ = canonical(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS), {"x": random(2, 5, 8)})
    assert ops_of(program) == {"rms_norm": 1}
    assert next(program.calls()).args[2] is None


def test_an_rms_norm_over_the_channels_of_each_head() -> None:
    def qk_norm(w: Tensor, x: Tensor) -> Tensor:
        return RMS["llama"](w, x.view(*x.shape[:-1], 4, 8)).transpose(1, 2)

    program, _ = canonical(qk_norm, {"x": random(2, 5, 32)}, w=random(8, seed=1))
    assert ops_of(program) == {"reshape": 1, "rms_norm": 1, "transpose": 1}


def test_a_norm_of_half_precision_keeps_its_rounding() -> None:
    """The model rounds before it multiplies by the weight; aten.rms_norm with a weight would not."""
    program, _ = canonical(RMS["llama"], {"x": random(2, 5, 8).half()}, w=random(8, seed=1).half())
    assert ops_of(program) == {"_to_copy": 2, "rms_norm": 1, "mul": 1}


def test_a_mean_over_other_channels_is_refused() -> None:
    spelling = lambda w, x: w * (x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS))  # noqa: E731
    program, runner = canonical(spelling, {"x": random(2, 5, 8)}, w=random(8, seed=1))
    assert ops_of(program)["rms_norm"] == 0
    assert "the mean runs over dimensions [-2, -1]" in runner.records[0].refusals[0]


def test_a_sum_in_the_place_of_the_mean_is_told() -> None:
    program, runner = canonical(lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS), {"x": random(2, 5, 8)})
    assert ops_of(program)["rms_norm"] == 0
    assert "RmsNorm: expected mean, found aten.sum.dim_IntList" in runner.records[0].refusals[0]


def cohere_norm(w: Tensor, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return w * ((x - mean) * torch.rsqrt(variance + EPS))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norms(bias: bool) -> None:
    inputs = {"x": random(2, 5, 8)}
    if bias:
        program, _ = canonical(lambda w, b, x: cohere_norm(w, x) + b, inputs, w=random(8, seed=1), b=random(8, seed=2))
    else:
        program, _ = canonical(cohere_norm, inputs, w=random(8, seed=1))
    assert ops_of(program) == {"layer_norm": 1}


def test_a_layer_norm_by_variance() -> None:
    def spelled(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)

    assert ops_of(canonical(spelled, {"x": random(2, 5, 8)})[0]) == {"layer_norm": 1}


# -- rotary ----------------------------------------------------------------------------------------------------

HEADS, WIDTH = 3, 8
FREQUENCIES = 10.0 ** -torch.arange(WIDTH // 2).float()


def angles(positions: Tensor) -> Tensor:
    return positions[..., None].float() * FREQUENCIES


def rotate_half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def rotate_chunks(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def llama(x: Tensor, positions: Tensor, rotate: Callable[[Tensor], Tensor] = rotate_half) -> Tensor:
    table = torch.cat((angles(positions), angles(positions)), dim=-1)
    cos, sin = (table.cos() * 1.5).unsqueeze(1), (table.sin() * 1.5).unsqueeze(1)
    return (x * cos) + (rotate(x) * sin)


def partial(x: Tensor, positions: Tensor) -> Tensor:
    return torch.cat((llama(x[..., :WIDTH], positions), x[..., WIDTH:]), dim=-1)


def cohere(x: Tensor, positions: Tensor) -> Tensor:
    table = torch.repeat_interleave(angles(positions), 2, dim=-1)
    return x * table.cos().unsqueeze(1) + rotate_pairs(x) * table.sin().unsqueeze(1)


def glm(x: Tensor, positions: Tensor) -> Tensor:
    table = torch.cat((angles(positions), angles(positions)), dim=-1)
    cos, sin = (f(table).unsqueeze(1)[..., : WIDTH // 2].repeat_interleave(2, dim=-1) for f in (torch.cos, torch.sin))
    return x * cos + rotate_pairs(x) * sin


def gpt_oss(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = angles(positions).cos().unsqueeze(1), angles(positions).sin().unsqueeze(1)
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def pairs_apart(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = angles(positions).cos().unsqueeze(1), angles(positions).sin().unsqueeze(1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def heads_last(x: Tensor, positions: Tensor) -> Tensor:
    table = torch.cat((angles(positions), angles(positions)), dim=-1)
    x = x.transpose(1, 2)
    return (x * table.cos().unsqueeze(2) + rotate_half(x) * table.sin().unsqueeze(2)).transpose(1, 2)


def complex_pairs(x: Tensor, positions: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(angles(positions)), angles(positions)) * 2.0
    x = x.transpose(1, 2)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[:, :, None, :]).flatten(3).type_as(x).transpose(1, 2)


def deepseek(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = angles(positions).cos().unsqueeze(1), angles(positions).sin().unsqueeze(1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


ROPES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "llama": (llama, False),
    "chunks": (lambda x, positions: llama(x, positions, rotate_chunks), False),
    "partial": (partial, False),
    "cohere": (cohere, True),
    "glm": (glm, True),
    "gpt_oss": (gpt_oss, False),
    "pairs apart": (pairs_apart, True),
    "heads last": (heads_last, False),
    "deepseek": (deepseek, False),
    "complex": (complex_pairs, True),
}


@pytest.mark.parametrize("spelling", ROPES)
def test_rotary_embeddings(spelling: str) -> None:
    function, interleaved = ROPES[spelling]
    width = WIDTH + 4 if spelling == "partial" else WIDTH
    inputs = {"x": random(2, HEADS, 5, width), "positions": torch.tensor([[0, 1, 2, 3, 4], [7, 3, 9, 0, 1]])}
    sizes = {"x": {0: "batch", 2: "sequence"}, "positions": {0: "batch", 1: "sequence"}}
    program, _ = canonical(function, inputs, sizes)
    (rope,) = program.calls(qc.rope)
    sorting = {"slice", "cat"} if spelling == "deepseek" else set()
    assert arguments(rope)["interleaved"] is interleaved
    assert {str(node.meta["type"]) for node in rope.all_input_nodes[1:]} == {"float32[batch, sequence, 4]"}
    assert ops_of(program).keys() <= {"qc.rope", "cos", "sin", "mul", "unsqueeze", "_to_copy"} | sorting


def test_a_stored_table_that_holds_each_angle_twice_is_halved() -> None:
    table = angles(torch.arange(16)).repeat(1, 2)

    def function(cos: Tensor, sin: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        return x * cos[positions].unsqueeze(1) + rotate_half(x) * sin[positions].unsqueeze(1)

    inputs = {"x": random(2, HEADS, 5, WIDTH), "positions": torch.arange(5).repeat(2, 1)}
    sizes = {"x": {0: "batch", 2: "sequence"}, "positions": {0: "batch", 1: "sequence"}}
    program, _ = canonical(function, inputs, sizes, cos=table.cos(), sin=table.sin())
    assert ops_of(program)["qc.rope"] == 1
    assert {name: tuple(t.shape) for name, t in program.tensors.items()} == {
        "cos_single": (16, WIDTH // 2),
        "sin_single": (16, WIDTH // 2),
    }


def test_tables_of_different_angles_are_refused() -> None:
    def function(cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
        return x * cos + rotate_half(x) * sin

    inputs = {"x": random(2, HEADS, 5, WIDTH)}
    program, runner = canonical(
        function, inputs, {"x": {0: "batch"}}, cos=random(5, WIDTH), sin=random(5, WIDTH, seed=1)
    )
    assert ops_of(program)["qc.rope"] == 0
    assert 'the stored table "cos" does not hold each angle twice' in runner.records[0].refusals[0]


def test_an_uneven_rotation_is_refused() -> None:
    def function(x: Tensor, positions: Tensor) -> Tensor:
        return llama(x, positions, lambda x: torch.cat((-x[..., 3:], x[..., :3]), dim=-1))

    inputs = {"x": random(2, HEADS, 5, WIDTH), "positions": torch.arange(5).repeat(2, 1)}
    program, runner = canonical(function, inputs, {"positions": {}})
    assert ops_of(program)["qc.rope"] == 0
    assert "x is not split in the middle" in runner.records[0].refusals[0]


# -- attention -------------------------------------------------------------------------------------------------

LOW = torch.finfo(torch.float32).min


def causal(q: Tensor, keys: Tensor) -> Tensor:
    place = torch.arange(keys.shape[2])
    return (place[None, :] <= torch.arange(q.shape[2])[:, None])[None, None]


def eager(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(q @ k.transpose(-1, -2)).softmax(-1) @ v


ATTENTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), {}),
    "sdpa causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), {"right": 0}),
    "sdpa scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7), {"scale": 0.7}),
    "plain": (lambda q, k, v: eager(q, k, v, lambda s: s), {"scale": 1.0}),
    "multiplied": (lambda q, k, v: eager(q, k, v, lambda s: 0.3 * s), {"scale": 0.3}),
    "divided": (lambda q, k, v: eager(q, k, v, lambda s: s / math.sqrt(8)), {}),
    "capped": (
        lambda q, k, v: eager(q, k, v, lambda s: torch.tanh(s * 0.3 / 2.0) * 2.0),
        {"scale": 0.3, "softcap": 2.0},
    ),
    "filled": (
        lambda q, k, v: eager(q, k, v, lambda s: (s * 0.3).masked_fill(~causal(q, k), LOW)),
        {"scale": 0.3, "right": 0},
    ),
    "chosen": (
        lambda q, k, v: eager(q, k, v, lambda s: torch.where(causal(q, k), s / 2, torch.full([], -1e9))),
        {"scale": 0.5, "right": 0},
    ),
    "added": (
        lambda q, k, v: eager(q, k, v, lambda s: s * 0.3 + torch.where(causal(q, k), 0.0, LOW)),
        {"scale": 0.3, "right": 0},
    ),
    "scaled after the mask": (
        lambda q, k, v: eager(q, k, v, lambda s: (s + torch.where(causal(q, k), 0.0, LOW)) / 2),
        {"scale": 0.5, "right": 0},
    ),
}


def attention_inputs(groups: int = 4) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    inputs = {n: random(2, 4 if n == "q" else groups, 5, 8, seed=i) for i, n in enumerate("qkv")}
    return inputs, {name: {0: "batch", 2: "sequence"} for name in inputs}


@pytest.mark.parametrize("spelling", ATTENTIONS)
def test_attentions(spelling: str) -> None:
    function, expected = ATTENTIONS[spelling]
    program, _ = canonical(function, *attention_inputs())
    assert ops_of(program) == {"qc.attention": 1}
    (node,) = program.calls(qc.attention)
    assert len(node.args) == 3
    assert dict(node.kwargs) == pytest.approx({"scale": 8**-0.5} | expected)


@pytest.mark.parametrize("by", ["expand", "repeat_interleave"])
def test_repeated_keys_are_grouped_heads(by: str) -> None:
    def repeat(x: Tensor) -> Tensor:
        if by == "repeat_interleave":
            return x.repeat_interleave(2, dim=1)
        b, g, s, d = x.shape
        return x[:, :, None].expand(b, g, 2, s, d).reshape(b, 2 * g, s, d)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    program, _ = canonical(function, *attention_inputs(groups=2))
    assert ops_of(program) == {"qc.attention": 1}
    assert [str(n.meta["type"]) for n in program.placeholders[1:]] == ["float32[batch, 2, sequence, 8]"] * 2


def test_a_bias_is_no_mask() -> None:
    def function(bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k, v, lambda s: s * 0.3 + bias + torch.where(causal(q, k), 0.0, LOW))

    inputs, _ = attention_inputs()
    program, _ = canonical(function, inputs, {n: {0: "batch"} for n in inputs}, bias=random(4, 1, 5))
    (node,) = program.calls(qc.attention)
    given = arguments(node)
    assert given["mask"] is None
    assert given["right"] == 0
    assert given["bias"].target == "bias"


def test_scores_that_are_scaled_after_a_bias_stay() -> None:
    def function(bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k, v, lambda s: (s + bias) * 0.3)

    inputs, _ = attention_inputs()
    program, runner = canonical(function, inputs, {n: {0: "batch"} for n in inputs}, bias=random(4, 1, 5))
    assert ops_of(program)["qc.attention"] == 0
    assert "its scores are scaled after something was added" in runner.records[0].refusals[0]


def test_a_mask_given_by_the_user_stays() -> None:
    inputs, _ = attention_inputs()
    inputs["seen"] = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    function = lambda q, k, v, seen: F.scaled_dot_product_attention(q, k, v, seen)  # noqa: E731
    program, runner = canonical(function, inputs, {})
    (node,) = program.calls(qc.attention)
    assert node.args[3] in program.placeholders
    assert "its mask stays a tensor: the mask is made by placeholder" in runner.records[0].refusals[0]


MASKS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "padding": (lambda like, real: real.bool()[:, None, None, :].expand(-1, 1, like.shape[2], -1), {}),
    "causal": (lambda like, real: causal(like, like), {"right": 0}),
    "causal, from keys": (
        lambda like, real: (torch.arange(like.shape[2])[:, None] >= torch.arange(like.shape[2]))[None, None],
        {"right": 0},
    ),
    "both": (lambda like, real: causal(like, like) & real.bool()[:, None, None, :], {"right": 0}),
    "window": (
        lambda like, real: (
            causal(like, like) & (torch.arange(like.shape[2]) > torch.arange(like.shape[2])[:, None] - 3)[None, None]
        ),
        {"left": 2, "right": 0},
    ),
    "gathered": (
        lambda like, real: (
            causal(like, like)
            & real.bool()[
                torch.arange(like.shape[0])[:, None, None, None], torch.arange(like.shape[2])[None, None, None]
            ]
        ),
        {"right": 0},
    ),
}


@pytest.mark.parametrize("spelling", MASKS)
def test_masks_are_folded(spelling: str) -> None:
    mask, expected = MASKS[spelling]
    inputs, sizes = attention_inputs()
    inputs["real"] = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    sizes["real"] = {0: "batch", 1: "sequence"}

    def function(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, mask(q, real))
        return out * (real != 0)[:, None, :, None]  # what a padded position makes of nothing is not told

    module = Spelled(function)
    program = capture(module, inputs, sizes)
    for node in program.calls(aten.scaled_dot_product_attention.default):
        assert node.args[3] is not None
    Canonicalize().run(program, Context())
    program.verify()
    expected_out = torch.nan_to_num(module(**inputs))
    torch.testing.assert_close(program(**inputs)["out"], expected_out, atol=2e-5, rtol=2e-4)
    (attention,) = program.calls(qc.attention)
    given = arguments(attention)
    assert given["mask"] is None
    assert (given["padding"] is None) == (spelling in ("causal", "causal, from keys", "window"))
    assert {name: given[name] for name in ("left", "right")} == {"left": -1, "right": -1} | expected


# -- linear layers ---------------------------------------------------------------------------------------------


def conv1d(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[1])


LINEARS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "conv1d": (conv1d, True),
    "matmul": (lambda w, x: x @ w, False),
    "matmul and bias": (lambda w, b, x: x @ w + b, True),
    "transposed": (lambda w, x: x @ w.t().contiguous().t(), False),
    "mm": (lambda w, x: torch.mm(x.reshape(-1, 6), w).view(*x.shape[:-1], 8), False),
    "einsum": (lambda w, x: torch.einsum("bsk,kn->bsn", x, w), False),
}


@pytest.mark.parametrize("spelling", LINEARS)
def test_linear_layers(spelling: str) -> None:
    function, biased = LINEARS[spelling]
    parameters = {"w": random(6, 8, seed=1)} | ({"b": random(8, seed=2)} if biased else {})
    program, _ = canonical(function, {"x": random(2, 5, 6)}, **parameters)
    assert ops_of(program) == {"linear": 1}
    (linear,) = program.linears()
    weight = program.tensor_of(linear.args[1])
    assert weight is not None
    assert weight.is_contiguous()
    assert torch.equal(weight, parameters["w"].t())
    assert str(linear.args[1].meta["type"]) == "float32[8, 6]"


def test_a_transposed_weight_keeps_its_name_unless_others_read_it() -> None:
    alone, _ = canonical(lambda w, x: x @ w, {"x": random(2, 5, 6)}, w=random(6, 8, seed=1))
    assert set(alone.tensors) == {"w"}
    shared, _ = canonical(lambda w, x: (x @ w) + (x.mean() * w)[0], {"x": random(2, 5, 6)}, w=random(6, 8, seed=1))
    assert set(shared.tensors) == {"w", "w_transposed"}


def test_products_of_activations_stay() -> None:
    program, _ = canonical(lambda x: x @ x.transpose(1, 2), {"x": random(2, 5, 6)})
    assert ops_of(program) == {"transpose": 1, "matmul": 1}


# -- what does nothing -----------------------------------------------------------------------------------------

NOTHINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous().clone().detach(),
    "cast": lambda x: x.float().to(x.dtype).type_as(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "arithmetic": lambda x: 1.0 * (x + 0) * 1 / 1.0 - 0,
    "slice": lambda x: x[:, :, :][..., :8],
    "view": lambda x: x.view(x.shape).reshape(x.shape).expand(x.shape),
    "transpose": lambda x: x.transpose(1, 2).permute(0, 2, 1),
    "cat": lambda x: torch.cat((x, x[..., 8:]), dim=-1),
    "empty part of any rank": lambda x: torch.cat((x.new_empty(0), x), dim=-1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
}


@pytest.mark.parametrize("spelling", NOTHINGS)
def test_what_does_nothing_goes(spelling: str) -> None:
    function = NOTHINGS[spelling]
    program, _ = canonical(lambda x: function(x).sin(), {"x": random(2, 5, 8)})
    assert ops_of(program) == {"sin": 1}


KEPT: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, int]]] = {
    "cast": (lambda x: x.half().float(), {"_to_copy": 2}),
    "slice": (lambda x: x[:, 1:], {"slice": 1}),
    "every other": (lambda x: x[..., ::2], {"slice": 1}),
    "integers": (lambda x: (x > 0) + 0, {"gt": 1, "add": 1}),
    "rounded": (lambda x: torch.div(x, 1, rounding_mode="floor"), {"div": 1}),
    "twice": (lambda x: torch.add(x, x, alpha=0.5), {"add": 1}),
}


@pytest.mark.parametrize("spelling", KEPT)
def test_what_does_something_stays(spelling: str) -> None:
    function, expected = KEPT[spelling]
    program, _ = canonical(function, {"x": random(2, 5, 8)})
    assert ops_of(program) == expected


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "permute": (lambda x: x.permute(0, 2, 1), "transpose(x, 1, 2)"),
    "negative": (lambda x: x.transpose(-1, -2), "transpose(x, 1, 2)"),
    "view": (lambda x: x.view(-1, 8), "reshape(x, [-1, 8])"),
    "split": (lambda x: x.split(4, dim=-1)[1], "split_with_sizes(x, [4, 4], -1)"),
    "chunk": (lambda x: x.chunk(2, dim=-1)[1], "split_with_sizes(x, [4, 4], -1)"),
    "cast": (lambda x: x.to(torch.float64), "_to_copy(x, dtype=torch.float64)"),
    "reflected": (lambda x: 3 + x, "add.Tensor(x, 3)"),
    "outer product": (lambda x: x[..., :1] @ x[:, :1], "mul.Tensor(slice_1, slice_3)"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_kind_of_call_has_one_spelling(spelling: str) -> None:
    function, expected = SPELLINGS[spelling]
    program, _ = canonical(function, {"x": random(2, 5, 8)})
    assert expected in program.text().replace("transpose.int", "transpose")


def test_gelu_and_silu() -> None:
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

    def bloom(x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    for spelled in (gelu, bloom):
        program, _ = canonical(spelled, {"x": random(2, 5, 8)})
        assert ops_of(program) == {"gelu": 1}
    assert ops_of(canonical(lambda x: torch.sigmoid(x) * x, {"x": random(2, 5, 8)})[0]) == {"silu": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x: (x @ x.transpose(-1, -2)).softmax(-1) @ x,
    ],
)
def test_what_is_rounded_at_each_step_stays_spelled_out(function: Callable[[Tensor], Tensor]) -> None:
    program, _ = canonical(function, {"x": random(2, 3, 5, 8).bfloat16()}, {"x": {0: "batch"}})
    assert not {"silu", "rms_norm", "qc.attention"} & ops_of(program).keys()


def test_a_part_of_a_stored_triangle_is_a_window() -> None:
    square = torch.ones(16, 16, dtype=torch.bool)

    def function(band: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        return eager(q, k, v, lambda s: torch.where(band[:, :, :length, :length], s, LOW))

    for band, left in ((square.tril(), -1), (square.tril() & square.triu(-3), 3)):
        program, _ = canonical(function, *attention_inputs(), band=band[None, None])
        (node,) = program.calls(qc.attention)
        assert ops_of(program) == {"qc.attention": 1}
        assert (arguments(node)["left"], arguments(node)["right"]) == (left, 0)


def test_parts_written_into_an_empty_tensor_are_put_side_by_side() -> None:
    def function(x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], 16)
        out[..., :8] = x
        out[..., 8:] = x.sin()
        return out

    assert ops_of(canonical(function, {"x": random(2, 5, 8)})[0]) == {"sin": 1, "cat": 1}


# -- constants, equal values -----------------------------------------------------------------------------------


def test_small_constants_are_computed_beforehand_and_large_ones_are_not() -> None:
    small, _ = canonical(lambda w, x: x * (w * 2 + 1), {"x": random(2, 5, 8)}, w=random(8))
    assert ops_of(small) == {"mul": 1}
    assert set(small.tensors) == {"w_folded"}
    large, _ = canonical(lambda w, x: (w * 2 + 1) + x, {"x": random(1, 2, 200)}, {}, w=random(200, 2, 200))
    assert ops_of(large) == {"mul": 1, "add": 2}


def test_equal_values_are_computed_once() -> None:
    program, _ = canonical(lambda x: (x + 1).sin() * (x + 1).sin(), {"x": random(2, 5, 8)})
    assert ops_of(program) == {"add": 1, "sin": 1, "mul": 1}


def test_random_values_are_not_merged() -> None:
    sk = Sketch()
    x = sk.input("x", BS, torch.float32)
    noise = [sk.call(aten.rand_like.default, x, to=BS) for _ in range(2)]
    program = sk.done(out=sk.call(aten.sub.Tensor, *noise, to=BS))
    assert merge_equal(program) == 0


def test_numbers_of_different_kinds_are_not_merged() -> None:
    sk = Sketch()
    x = sk.input("x", BS, torch.int64)
    one, other = (sk.call(aten.mul.Tensor, x, n, to=BS, dtype=d) for n, d in ((2, torch.int64), (2.0, torch.float32)))
    assert merge_equal(sk.done(a=one, b=other)) == 0


def test_a_second_time_changes_nothing() -> None:
    inputs = {"x": random(2, HEADS, 5, WIDTH), "positions": torch.arange(5).repeat(2, 1)}
    sizes = {"x": {0: "batch", 2: "sequence"}, "positions": {0: "batch", 1: "sequence"}}
    program, _ = canonical(heads_last, inputs, sizes)
    before = program.fingerprint()
    runner = canonicalized(program, inputs)
    assert not runner.records[0].changed
    assert program.fingerprint() == before


def test_origins_are_kept() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Spelled(RMS["llama"], w=random(8, seed=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x=x)

    program = capture(Block(), {"x": random(2, 5, 8)}, {"x": {0: "batch"}})
    canonicalized(program, {"x": random(2, 5, 8)})
    (norm,) = program.calls(aten.rms_norm.default)
    assert norm.meta["path"] == "norm"
    assert str(norm.meta["type"]) == "float32[batch, 5, 8]"


# -- whole models ----------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each architecture wants beside: whatever makes its sizes small and its features matter.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "cohere": {},
    "glm4": {"head_dim": 8},
    "bert": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "falcon": {},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {},
    "gpt_oss": {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "llama4_text": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "mixtral": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "stablelm": {},
    "starcoder2": {},
}
QUICK = ("llama", "gemma2", "gpt2", "gptj", "cohere", "glm4", "bert")
SHOWN = ("rms_norm", "layer_norm", "qc.rope", "qc.attention", "linear")
LEFT = ("rsqrt", "qc.mask", "softmax", "addmm", "mm", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention")


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a in QUICK else pytest.mark.slow) for a in MODELS]
)
def test_models_become_few_operators(architecture: str, golden: Callable[[str, str], None]) -> None:
    program, model = captured(architecture)
    raw = len(program.graph.nodes)
    ids = torch.arange(3, 25).view(2, 11)
    real = torch.ones_like(ids)
    real[0, :4] = 0
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
    inputs = {i.name: inputs[i.name] for i in program.inputs}
    runner = canonicalized(program, inputs)
    with torch.no_grad():
        expected = model(**inputs)[0]
    got = program(**inputs)[program.outputs[0]]
    torch.testing.assert_close(got[real != 0], expected[real != 0], atol=1e-5, rtol=1e-4)
    assert len(program.graph.nodes) < raw
    golden(f"canonicalize/{architecture}", summary(program, runner))


def captured(architecture: str) -> tuple[Program, nn.Module]:
    """A tiny random model and its raw program."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from qcompiler.frontends.huggingface import capture_model

    config = AutoConfig.for_model(architecture, **TINY, **MODELS[architecture])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = AutoModel if architecture == "bert" else AutoModelForCausalLM
        model = kind.from_config(config).eval()
        for value in model.parameters():
            if value.dim() == 1:  # norms and biases start at ones and zeros, which would hide much
                value.data += torch.randn_like(value) * 0.1
            else:
                value.data *= 5.0
    return capture_model(model), model


def summary(program: Program, runner: Runner) -> str:
    """How many of each operator there are, what is left of other spellings, and what was refused, once each."""
    counts = ops_of(program)
    lines = [f"{name} {counts[name]}" for name in SHOWN]
    lines += [f"left: {name} {counts[name]}" for name in LEFT if counts[name]]
    masked = sum(arguments(node)["mask"] is not None for node in program.calls(qc.attention))
    lines += [f"attention with a mask: {masked}"] if masked else []
    lines += sorted({"no: " + re.sub(r"^.*?\): ", "", text) for text in runner.records[0].refusals})
    return "\n".join(lines)


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the text is that of one version of transformers")
def test_a_llama_in_full(golden: Callable[[str, str], None]) -> None:
    program, _ = captured("llama")
    Canonicalize().run(program, Context())
    golden("canonicalize/llama-graph", renamed(program))


def renamed(program: Program) -> str:
    """The program's text with nodes numbered by operator: names that export makes up differ between versions."""
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node in program.calls():
        kind = op_name(node).rpartition(".")[2] or node.name
        names[node.name] = f"{kind}_{seen[kind]}"
        seen[kind] += 1
    return re.sub(r"(?<![\w.])(\w+)(?![\w.(])", lambda m: names.get(m[1], m[1]), program.text())
