"""nf4 and fp4: blocks as bitsandbytes cuts them, scales quantized too, and better than round-to-nearest on weights."""

import pytest
import torch

from qcompiler.codebooks import BLOCKS
from qcompiler.errors import RecipeError
from qcompiler.passes.fp4 import Fp4
from qcompiler.passes.nf4 import Nf4
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.scheme import QTensor, Scheme
from tests.programs import located, tiny_llama


@pytest.fixture(scope="module")
def model() -> Program:
    return located(tiny_llama(tied=False))


def quantized(model: Program, step: str) -> Program:
    program = model.copy()
    Runner(Context(), []).run(program, Recipe.parse(step).passes)
    return program


def error(model: Program, program: Program) -> float:
    """The relative error of all quantized weights together."""
    both = [(program.qtensor(n).dequantize(), model.tensors[n]) for n in program.quantized]
    return float(sum((a - b).square().sum() for a, b in both) / sum(b.square().sum() for _, b in both)) ** 0.5


def test_normal_weights_fit_its_values_better_than_even_steps(model: Program) -> None:
    errors = {step: error(model, quantized(model, step)) for step in ("nf4{block=32}", "rtn{scheme=int4:g32}")}
    assert errors["nf4{block=32}"] < 0.97 * errors["rtn{scheme=int4:g32}"]
    assert errors["nf4{block=32}"] < error(model, quantized(model, "fp4{block=32}"))


def test_double_quantization_costs_little_and_saves_bits(model: Program) -> None:
    plain, double = (quantized(model, f"nf4{{block=32 double={d}}}") for d in ("false", "true"))
    assert error(model, double) < 1.02 * error(model, plain)
    name = max(plain.quantized, key=lambda n: plain.qtensor(n).codes.numel())
    scale = double.qtensor(name).scale
    assert isinstance(scale, QTensor)
    assert scale.codes.nbytes == scale.codes.numel() == plain.qtensor(name).scale.numel()


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_every_size_run(model: Program, block: int) -> None:
    program = quantized(model, f"nf4{{block={block}}}, fuse, pack")
    ids = torch.arange(8)[None]
    assert torch.isfinite(program(input_ids=ids)["logits"]).all()
    assert error(model, quantized(model, f"nf4{{block={block}}}")) < 0.2


def test_options_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="nf4: block is 48; it must be one of 32, 64"):
        Nf4(block=48).run(None, None)  # type: ignore[arg-type]
    assert (Nf4().name, Fp4().name) == ("nf4", "fp4")
    assert Scheme.parse("fp4:g64").code == "fp"
