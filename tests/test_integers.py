"""integers: rounded activations and quantized weights become products of codes, with the same results."""

import pytest
import torch

from qcompiler import data
from qcompiler.ops import qc
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from tests.programs import located, tiny_llama

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def ran(recipe: str) -> tuple[Program, Runner]:
    program = located(tiny_llama())
    samples = data.check_samples(program)
    runner = Runner(Context(samples=samples), samples)
    runner.run(program, Recipe.parse(recipe).passes)
    return program, runner


@pytest.mark.parametrize(
    ("activation", "weight"),
    [
        ("int8:token:asym:dynamic", "int4:g8:asym"),
        ("int8:tensor:asym", "int8:channel:sym"),
        ("int4:g8:asym", "int4:g16:asym"),
        ("int8:g16:sym:dynamic", "int4:g8:sym"),
        ("fp8:token:dynamic", "fp8:channel"),
        ("fp8:token:dynamic", "int4:g8:asym"),
    ],
)
def test_codes_are_multiplied(activation: str, weight: str) -> None:
    recipe = f"activations{{scheme={activation}}}, rtn{{scheme={weight}}}, fuse, kv_cache"
    floats, _ = ran(recipe)
    program, runner = ran(f"{recipe}, integers, pack")
    assert not list(program.calls(qc.linear))  # the head is float
    assert not list(program.calls(qc.fake_quantize))
    assert len(list(program.calls(qc.integer_linear))) == 8  # two layers of four, fused
    assert runner.records[-2].refusals == []
    expected, found = floats(input_ids=IDS)["logits"], program(input_ids=IDS)["logits"]
    assert float((found - expected).norm() / expected.norm()) < 2e-3  # a value on the edge of two codes may fall
    torch.testing.assert_close(program.decoded()(input_ids=IDS)["logits"], expected, rtol=1e-3, atol=2e-2)


def test_groups_that_do_not_nest_stay_apart() -> None:
    program, runner = ran("activations{scheme=int8:g16:asym}, rtn{scheme=int4:g24}, integers")
    assert not list(program.calls(qc.integer_linear))
    assert any(
        "groups of int8:g16:asym and of int4:g24:sym do not nest" in text for text in runner.records[-1].refusals
    )


def test_codes_of_another_kind_stay_apart() -> None:
    _, runner = ran("activations{scheme=nf4:g16:dynamic}, rtn{scheme=int4:g16}, integers")
    assert any("are not both integers" in text for text in runner.records[-1].refusals)
    _, runner = ran("activations{scheme=fp8:token:dynamic}, rtn{scheme=int8:g16}, integers")
    assert any("codes of int8:g16:sym are no floats of fp8:token:sym:dynamic" in t for t in runner.records[-1].refusals)
