"""fuse: siblings become one linear layer, and nothing else changes."""

import pytest
import torch

from qcompiler.ops import qc
from qcompiler.passes.fuse import Fuse
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from tests.programs import tiny_llama

aten = torch.ops.aten
IDS = torch.arange(14).view(2, 7)


def fused(program: Program) -> Context:
    ctx = Context()
    Fuse().run(program, ctx)
    program.verify()
    return ctx


def quantize(program: Program, scheme: str, only: str = "proj") -> None:
    for name in [n for n in program.tensors if only in n and n.endswith("weight")]:
        program.quantize_tensor(name, QTensor.quantize(program.tensors[name], Scheme.parse(scheme)))


@pytest.mark.parametrize("bias", [False, True])
def test_float_siblings_fuse(bias: bool) -> None:
    program = tiny_llama(bias=bias)
    before = program(input_ids=IDS)["logits"]
    ctx = fused(program)
    assert ctx.record.refusals == []
    assert "model.layers.1.self_attn.qkv_proj.weight" in program.tensors
    assert "model.layers.1.mlp.gate_up_proj.weight" in program.tensors
    assert not any("q_proj.weight" in name for name in program.tensors)
    assert len(program.linears()) == 4 * 2 + 1
    torch.testing.assert_close(program(input_ids=IDS)["logits"], before)


@pytest.mark.parametrize("scheme", ["int4:g32:asym", "int3:g48", "int8:channel"])
def test_quantized_siblings_fuse_without_touching_a_code(scheme: str) -> None:
    program = tiny_llama()
    quantize(program, scheme)
    rows = torch.cat([program.qtensor(f"model.layers.0.self_attn.{n}_proj.weight").dequantize() for n in "qkv"])
    before = program(input_ids=IDS)["logits"]
    fused(program)
    assert torch.equal(program.qtensor("model.layers.0.self_attn.qkv_proj.weight").dequantize(), rows)
    assert len(list(program.calls(qc.linear))) == 4 * 2
    torch.testing.assert_close(program(input_ids=IDS)["logits"], before)


def test_twice_is_once() -> None:
    program = tiny_llama()
    fused(program)
    text = program.text()
    fused(program)
    assert program.text() == text


@pytest.mark.parametrize(
    ("scheme", "only", "reason"),
    [
        ("int8:tensor", "proj", "one scale for the whole tensor"),
        ("int4:g32", "q_proj", "some are quantized and some are not"),
    ],
)
def test_refusals_say_why(scheme: str, only: str, reason: str) -> None:
    program = tiny_llama(layers=1)
    quantize(program, scheme, only)
    ctx = fused(program)
    assert any("layers.0.self_attn.qkv_proj" in text and reason in text for text in ctx.record.refusals)


def test_different_schemes_stay_apart() -> None:
    program = tiny_llama(layers=1)
    quantize(program, "int4:g32", "gate_proj")
    quantize(program, "int8:g32", "up_proj")
    ctx = fused(program)
    assert any("schemes int4:g32:sym and int8:g32:sym differ" in text for text in ctx.record.refusals)


def test_a_tied_weight_stays_apart() -> None:
    program = tiny_llama(layers=1)
    up = next(n for n in program.graph.nodes if n.op == "get_attr" and "up_proj" in n.target)
    gate = next(n for n in program.graph.nodes if n.op == "get_attr" and "gate_proj" in n.target)
    up.target = gate.target
    ctx = fused(program)
    assert any("one weight is used twice" in text for text in ctx.record.refusals)
