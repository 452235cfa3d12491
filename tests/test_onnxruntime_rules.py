"""Each rule of the backend onnxruntime against PyTorch, on values of a dynamic batch and a dynamic length."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.frontends.exporting import export
from qcompiler.program import Program
from qcompiler.target import refusals_of

pytest.importorskip("onnxruntime")

from qcompiler.backends.onnxruntime import OnnxRuntime

BACKEND = OnnxRuntime(accuracy_level=0, threads=1)
Function = Callable[..., Any]


class Module(nn.Module):
    """Several functions of x [batch, length, 6] and i [batch, length], each an output."""

    def __init__(self, functions: Sequence[Function]) -> None:
        super().__init__()
        self.functions = functions
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.image = nn.Conv2d(1, 3, (1, 2), dilation=(1, 3), bias=False)
        self.layer, self.plain, self.rms = nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False), nn.RMSNorm(6)
        self.group = nn.GroupNorm(3, 6)

    def forward(self, x: Tensor, i: Tensor) -> dict[str, Tensor]:
        found = {}
        for number, function in enumerate(self.functions):
            value = function(self, x, i)
            parts = value if isinstance(value, (tuple, list)) else (value,)
            found |= {f"f{number}_{k}": part for k, part in enumerate(parts)}
        return found


def example(batch: int, length: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(batch * 100 + length)
    return {
        "x": torch.randn(batch, length, 6, generator=random),
        "i": torch.randint(0, 11, (batch, length), generator=random),
    }


def check(*functions: Function) -> None:
    """The functions give the same in ONNX Runtime as in PyTorch, at sizes other than those captured."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Module(functions)
    sizes = {"x": {0: "batch", 1: "sequence"}, "i": {0: "batch", 1: "sequence"}}
    program: Program = export(module, example(2, 7), sizes, lambda given: module(**given))
    assert list(refusals_of(program, BACKEND)) == []
    runner = BACKEND.lower(program)
    for batch, length in ((3, 9), (1, 5)):
        inputs = example(batch, length)
        found, expected = runner(inputs), module(**inputs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


POINTWISE = [torch.abs, torch.neg, torch.exp, torch.sin, torch.cos, torch.tan, torch.tanh, torch.sigmoid, torch.relu]
POINTWISE += [torch.erf, torch.floor, torch.ceil, torch.round, torch.sign, torch.square, torch.isnan, torch.isinf]
POINTWISE += [torch.expm1, F.silu, F.gelu, F.mish, F.hardswish, F.hardsigmoid, F.relu6, F.softplus, F.softsign]


def test_functions_of_one_value() -> None:
    check(*(lambda m, x, i, f=f: f(x) for f in POINTWISE))


def test_functions_of_one_positive_value() -> None:
    positive = [torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log1p]
    check(*(lambda m, x, i, f=f: f(x.abs() + 0.5) for f in positive))


def test_functions_with_options() -> None:
    check(
        lambda m, x, i: F.gelu(x, approximate="tanh"),
        lambda m, x, i: F.leaky_relu(x, 0.2),
        lambda m, x, i: F.hardtanh(x, -0.5, 0.7),
        lambda m, x, i: F.softplus(x, beta=2.0),
        lambda m, x, i: x.clamp(-0.3, 0.4),
        lambda m, x, i: x.clamp(min=0.1),
        lambda m, x, i: x.clamp_max(0.1),
        lambda m, x, i: i.clamp(2, 5),
        lambda m, x, i: F.dropout(x, 0.5, training=False),
        lambda m, x, i: x**2 + x**3 + x.abs() ** 0.5 + x.abs() ** 1.7,
        lambda m, x, i: 2.0**x,
    )


def test_arithmetic() -> None:
    check(
        lambda m, x, i: torch.add(x, x.flip(-1), alpha=3),
        lambda m, x, i: torch.sub(x, 2.0, alpha=0.5),
        lambda m, x, i: 1 - x,
        lambda m, x, i: x * i.unsqueeze(-1),
        lambda m, x, i: x / 3,
        lambda m, x, i: i / 3,
        lambda m, x, i: (i - 5) // 3,
        lambda m, x, i: (i - 5) % 3,
        lambda m, x, i: x // 0.4,
        lambda m, x, i: x % 0.4,
        lambda m, x, i: torch.div(x, 0.3, rounding_mode="trunc"),
        lambda m, x, i: torch.div(i - 5, 3, rounding_mode="trunc"),
        lambda m, x, i: torch.maximum(x, -x),
        lambda m, x, i: torch.minimum(i, 5 - i),
    )


def test_comparisons_and_logic() -> None:
    check(
        lambda m, x, i: (x > 0) & (x < 1),
        lambda m, x, i: (x >= 0.1) | (x <= -0.1),
        lambda m, x, i: (i == 3) ^ (i != 4),
        lambda m, x, i: ~(i > 2.5),
        lambda m, x, i: (i > 2) == (x[..., 0] > 0),
        lambda m, x, i: torch.logical_and(i, x[..., 0] > 0),
        lambda m, x, i: torch.logical_not(i),
        lambda m, x, i: i & 3 | 8,
        lambda m, x, i: ~i,
        lambda m, x, i: torch.where(x > 0, x, 0.0),
        lambda m, x, i: x.masked_fill(i.unsqueeze(-1) > 4, -math.inf),
    )


def test_dtypes() -> None:
    check(
        lambda m, x, i: x.to(torch.float64),
        lambda m, x, i: i.to(torch.float32),
        lambda m, x, i: i.int(),
        lambda m, x, i: x > 0,
        lambda m, x, i: (x * 3).long(),
        lambda m, x, i: i.bool(),
        lambda m, x, i: i.type_as(x) + 1,
        lambda m, x, i: i.int() + i,
    )


def test_shapes() -> None:
    check(
        lambda m, x, i: x.view(x.shape[0], x.shape[1], 2, 3),
        lambda m, x, i: x.reshape(-1, 6),
        lambda m, x, i: x.reshape(x.shape[0] * x.shape[1], 3, 2),
        lambda m, x, i: x.view(x.shape[0], -1),
        lambda m, x, i: x.reshape(x.shape[1], x.shape[0], 6),
        lambda m, x, i: x.flatten(1),
        lambda m, x, i: x.flatten(0, 1),
        lambda m, x, i: x.unflatten(-1, (3, 2)),
        lambda m, x, i: x.unsqueeze(0).unsqueeze(-1),
        lambda m, x, i: x.unsqueeze(1).squeeze(1),
        lambda m, x, i: x[:, :, None].squeeze(2),
        lambda m, x, i: x.transpose(1, 2),
        lambda m, x, i: x.permute(2, 0, 1),
        lambda m, x, i: x.mT,
        lambda m, x, i: x[..., :1].expand(-1, -1, 4),
        lambda m, x, i: i[None].expand(3, x.shape[0], x.shape[1]),
        lambda m, x, i: x[..., :1].expand_as(x),
        lambda m, x, i: x.repeat(2, 1, 3),
        lambda m, x, i: i.repeat(2, 1, 1),
        lambda m, x, i: x.repeat_interleave(2, dim=1),
        lambda m, x, i: x.contiguous().clone().detach(),
    )


def test_parts() -> None:
    check(
        lambda m, x, i: torch.cat([x, x[:, :2], i.unsqueeze(-1).expand(-1, -1, 6)], dim=1),
        lambda m, x, i: torch.stack([x, -x], dim=-1),
        lambda m, x, i: x.split(4, dim=-1),
        lambda m, x, i: x.split([1, 2, 3], dim=2),
        lambda m, x, i: x.chunk(4, dim=-1),
        lambda m, x, i: x.unbind(-1)[2:4],
        lambda m, x, i: x[:, -1],
        lambda m, x, i: x[:, 1:-1, ::2],
        lambda m, x, i: x[:, : x.shape[1] - 2],
        lambda m, x, i: x.narrow(2, 1, 3),
        lambda m, x, i: x.index_select(2, torch.tensor([3, 0, 3])),
        lambda m, x, i: x.gather(2, (i % 6).unsqueeze(-1)),
        lambda m, x, i: m.table.weight[i],
        lambda m, x, i: m.table.weight[i, (i % 6)],
        lambda m, x, i: m.table(i),
    )


def test_moves() -> None:
    check(
        lambda m, x, i: x.flip(1, 2),
        lambda m, x, i: x.roll(2, 1) + x.roll((1, -1), (1, 2)),
        lambda m, x, i: F.pad(x, (1, 2, 0, 3), value=7.0),
        lambda m, x, i: F.pad(x, (-1, 2)),
        lambda m, x, i: F.pad(x, (2, 1), mode="reflect"),
    )


def test_new_values() -> None:
    check(
        lambda m, x, i: torch.arange(x.shape[1]),
        lambda m, x, i: torch.arange(2, 9) * 1.0,
        lambda m, x, i: torch.arange(1.0, 4.0, 0.5),
        lambda m, x, i: torch.zeros(x.shape[0], 3),
        lambda m, x, i: torch.ones(3, x.shape[1], dtype=torch.int64),
        lambda m, x, i: torch.full((x.shape[1], 2), 2.5),
        lambda m, x, i: torch.zeros_like(x) + torch.ones_like(i).unsqueeze(-1),
        lambda m, x, i: torch.full_like(x, -3.0),
        lambda m, x, i: x.new_zeros(x.shape[0], 2) + x.new_ones(2) + x.new_full((1,), 4),
        lambda m, x, i: torch.ones(x.shape[1], x.shape[1]).triu(1),
        lambda m, x, i: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
        lambda m, x, i: F.one_hot(i, 11),
        lambda m, x, i: torch.zeros(x.shape[0], x.shape[1], 11).scatter(2, i.unsqueeze(-1), 1.0),
        lambda m, x, i: torch.zeros(x.shape[0], 11).scatter_add(1, i, x[..., 0]),
        lambda m, x, i: torch.scalar_tensor(4.0) * x,
    )


def test_reductions() -> None:
    check(
        lambda m, x, i: (x.sum(), x.sum(1), x.sum((0, 2), keepdim=True), (i > 3).sum(-1)),
        lambda m, x, i: (x.mean(), x.mean(-1, keepdim=True), x.mean(1)),
        lambda m, x, i: (x.amax(-1), x.amin((1, 2), keepdim=True), x.max(), x.min()),
        lambda m, x, i: (*x.max(-1), *x.min(1, keepdim=True)),
        lambda m, x, i: torch.max(x, -x),
        lambda m, x, i: (x.argmax(-1), x.argmin(1, keepdim=True), x.argmax()),
        lambda m, x, i: (x.prod(-1), x.logsumexp(-1)),
        lambda m, x, i: ((x > 0).any(), (x > 0).all(-1), (x > -9).all(), (i > 3).any(1)),
        lambda m, x, i: (x.var(-1), x.var(-1, correction=0, keepdim=True)),
        lambda m, x, i: (x.softmax(-1), x.log_softmax(1), i.softmax(-1, dtype=torch.float32)),
        lambda m, x, i: (x.cumsum(1), i.cumsum(-1), (i > 2).cumsum(1)),
        lambda m, x, i: (*x.topk(3, dim=-1), *x.topk(2, dim=1, largest=False)),
        lambda m, x, i: (*x.sort(-1), *x.sort(1, descending=True)),
    )


def test_products() -> None:
    check(
        lambda m, x, i: F.linear(x, m.table.weight, torch.arange(11.0)),
        lambda m, x, i: x @ x.transpose(1, 2),
        lambda m, x, i: torch.bmm(x, x.transpose(1, 2)),
        lambda m, x, i: torch.mm(x[0], m.table.weight.t()),
        lambda m, x, i: torch.addmm(torch.arange(11.0), x[0], m.table.weight.t(), beta=0.5, alpha=2.0),
        lambda m, x, i: torch.einsum("bld,vd->blv", x, m.table.weight),
        lambda m, x, i: x @ m.table.weight[0],
    )


def test_norms_and_convolutions() -> None:
    check(
        lambda m, x, i: (m.layer(x), m.plain(x), m.rms(x)),
        lambda m, x, i: F.rms_norm(x, (6,)),
        lambda m, x, i: m.group(x.transpose(1, 2)),
        lambda m, x, i: m.conv(x.transpose(1, 2)),
        lambda m, x, i: m.image(x.unsqueeze(1)),
    )


def test_attention() -> None:
    def heads(x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 3, 2).transpose(1, 2)[:, :count]

    check(
        lambda m, x, i: F.scaled_dot_product_attention(heads(x, 3), heads(-x, 3), heads(x, 3)),
        lambda m, x, i: F.scaled_dot_product_attention(heads(x, 3), heads(-x, 3), heads(x, 3), is_causal=True),
        lambda m, x, i: F.scaled_dot_product_attention(
            heads(x, 3), heads(-x, 3), heads(x, 3), attn_mask=(i > 2)[:, None, None], scale=0.3
        ),
    )
