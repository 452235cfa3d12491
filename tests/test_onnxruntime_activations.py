"""Rounded activations and low-bit caches in ONNX Runtime: the same codes, so the same results."""

import pytest
import torch

from qcompiler import data
from qcompiler.ops import qc
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.target import refusals_of
from tests.programs import tiny_encoder, tiny_llama

pytest.importorskip("onnxruntime")

from qcompiler.backends.onnxruntime import OnnxRuntime

EXACT = OnnxRuntime(accuracy_level=0, threads=1)
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def made(recipe: str, build: object = tiny_llama) -> Program:
    program: Program = build()  # type: ignore[operator]
    samples = data.check_samples(program)
    Runner(Context(samples=samples), samples).run(program, Recipe.parse(recipe).passes)
    return program


def difference(program: Program, output: str = "logits") -> float:
    """Of ONNX Runtime's result from the reference's, root mean square, relative."""
    assert list(refusals_of(program, EXACT)) == []
    found, expected = EXACT.lower(program)({"input_ids": IDS})[output], program(input_ids=IDS)[output]
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "scheme", ["int8:token:asym:dynamic", "int4:g8:sym:dynamic", "int8:tensor:asym", "int4:g8:asym", "int8:channel:sym"]
)
def test_rounded_activations(scheme: str) -> None:
    program = made(f"activations{{scheme={scheme} include=*}}")
    # A value on the edge between two codes may fall to the other side: that is rare and small.
    assert difference(program) < (2e-3 if "8" in scheme else 2e-2)


def test_online_rotations() -> None:
    """Of powers of two (the keys' 16 channels) and of others (the MLP's 96)."""
    program = made("canonicalize, rotate{online=true}, fuse, kv_cache")
    assert {node.kwargs["size"] for node in program.calls(qc.hadamard)} == {16, 96}
    assert difference(program) < 1e-5


def test_static_8_bits_are_multiplied_in_integers() -> None:
    program = made(
        "activations{scheme=int8:tensor:asym include=*}, rtn{scheme=int8:channel:sym include=*}, "
        "fuse, kv_cache, integers"
    )
    assert difference(program) < 2e-3
    kernels = EXACT.lower(program).details()["kernels"]
    assert kernels["MatMulIntegerToFloat"] > 5
    encoder = made(
        "activations{scheme=int8:tensor:asym include=*}, rtn{scheme=int8:channel:sym include=*}, integers", tiny_encoder
    )
    assert difference(encoder, encoder.outputs[0]) < 2e-3


def test_other_schemes_say_why_they_are_not() -> None:
    program = made(
        "activations{scheme=int4:token:asym:dynamic include=*}, rtn{scheme=int8:channel:sym include=*}, integers"
    )
    refusals = EXACT.lower(program).details()["refusals"]
    wanted = "MatMulIntegerToFloat takes activations of int8:tensor or int8:token, not int4:token:asym:dynamic"
    assert any(wanted in r for r in refusals)


@pytest.mark.parametrize("scheme", ["int8:token:asym:dynamic", "int8:token:sym:dynamic"])
def test_a_scale_a_token_is_multiplied_in_integers(scheme: str) -> None:
    program = made(f"activations{{scheme={scheme} include=*}}, rtn{{scheme=int8:channel:sym include=*}}, integers")
    assert difference(program) < 2e-3
    assert EXACT.lower(program).details()["kernels"]["MatMulIntegerToFloat"] > 5


@pytest.mark.parametrize("scheme", ["int8:token:asym:dynamic", "int8:g16:asym"])
def test_8_bits_are_left_to_matmulnbits(scheme: str) -> None:
    """It rounds each token and block by itself: rounding before as well would only take time."""
    program = made(f"activations{{scheme={scheme} include=*}}, rtn{{scheme=int4:g16:sym include=*}}, integers")
    runner = OnnxRuntime(accuracy_level=4, threads=1).lower(program)
    details, found = runner.details(), runner({"input_ids": IDS})["logits"]
    assert any("MatMulNBits rounds activations to 8 bits in its own way" in text for text in details["refusals"])
    exact, rounded = tiny_llama()(input_ids=IDS)["logits"], program(input_ids=IDS)["logits"]
    assert float((found - exact).norm()) < 1.2 * float((rounded - exact).norm())  # static ranges may cut off more


@pytest.mark.parametrize(("bits", "most"), [(8, 4e-3), (4, 3e-2)])
@pytest.mark.parametrize("granularity", ["g8", "channel", "tensor"])
def test_a_cache_of_codes(bits: int, most: float, granularity: str) -> None:
    scheme = f"int{bits}:{granularity}:sym"
    program = made(f"kv{{key={scheme} value={scheme}}}, fuse, kv_cache")
    runner = EXACT.lower(program)
    assert difference(program) < most
    assert f"GroupQueryAttention in {bits} bits" in runner.details()["kernels"]
    decoder = runner.decoder(2, 16)
    cache = decoder.caches["past_key_0"]  # type: ignore[attr-defined]
    assert cache.dtype == (torch.int8 if bits == 8 else torch.uint8)
    whole, at = program(input_ids=IDS)["logits"], 0
    for size in (4, 1, 3, 1):
        at += size
        logits = decoder.step(IDS[:, at - size : at])
        assert float((logits - whole[:, at - 1]).norm() / whole[:, at - 1].norm()) < most


def test_a_cache_it_does_not_have_stays_float_and_says_so() -> None:
    program = made("kv{key=int8:token:asym:dynamic value=int8:token:asym:dynamic}, fuse, kv_cache")
    assert difference(program) < 2e-3
    refusals = EXACT.lower(program).details()["refusals"]
    assert any(
        "GroupQueryAttention stores 8 or 4 bits, static and symmetric, not int8:token:asym:dynamic" in r
        for r in refusals
    )


@pytest.mark.parametrize(
    "options",
    [
        "key=int4:channel:asym:dynamic block=4 value=int4:g8:asym:dynamic",
        "key=int4:token:asym:dynamic value=int4:token:asym:dynamic recent=3 first=2",
        "key=int8:channel:sym:dynamic block=8 value=int8:token:sym:dynamic recent=2 first=1",
    ],
)
def test_attention_over_some_floats(options: str) -> None:
    program = made(f"kv{{{options}}}, fuse, kv_cache")
    assert list(refusals_of(program, EXACT)) == []
    runner, most = EXACT.lower(program), 2e-2 if "int4" in options else 2e-3
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    found = runner({"input_ids": IDS, "attention_mask": mask})["logits"]
    expected = program(input_ids=IDS, attention_mask=mask)["logits"]
    assert float((found - expected)[mask.bool()].norm() / expected[mask.bool()].norm()) < most
    decoder, whole, at = runner.decoder(2, 16), program(input_ids=IDS)["logits"], 0
    for size in (4, 1, 3, 1):
        at += size
        logits = decoder.step(IDS[:, at - size : at])
        assert float((logits - whole[:, at - 1]).norm() / whole[:, at - 1].norm()) < most


def test_norms_that_store_in_another_order_are_followed_by_a_gather() -> None:
    program = made("rptq{group=4 head_group=4}, fuse, kv_cache")
    assert difference(program) < 1e-5
    assert any("rptq{norms=residual} needs none" in text for text in EXACT.lower(program).details()["refusals"])
    without = made("rptq{group=4 head_group=4 norms=residual}, fuse, kv_cache")
    assert difference(without) < 1e-5
    assert not any("stores in another order" in text for text in EXACT.lower(without).details()["refusals"])


def test_rounded_attention_weights() -> None:
    program = made("kv{key=int8:g8:asym value=int8:g8:asym query=int8:g8:asym levels=255}, fuse, kv_cache")
    assert difference(program) < 5e-3
