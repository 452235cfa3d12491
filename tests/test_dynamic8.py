"""dynamic8: blocks of 8-bit codes; its codes are compared with bitsandbytes' in test_formats_bitsandbytes.py."""

import pytest
import torch

from qcompiler.codebooks import BLOCKS, dynamic_map, quantize_dynamic
from qcompiler.convert import held_kinds
from qcompiler.errors import RecipeError
from qcompiler.passes.dynamic8 import Dynamic8
from qcompiler.pipeline import Context, Runner
from qcompiler.plugins import lookup
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.scheme import QTensor, Scheme
from tests.programs import located, tiny_llama


@pytest.fixture(scope="module")
def model() -> Program:
    return located(tiny_llama(tied=False))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_weight_is_stored_in_blocks_of_8_bits(model: Program, block: int) -> None:
    program = model.copy()
    Runner(Context(), []).run(program, Recipe.parse(f"dynamic8{{block={block}}}, fuse, pack").passes)
    assert program.quantized
    for name in program.quantized:
        record = program.qtensor(name)
        assert record.scheme == Scheme.parse(f"nf8:g{block}")
        assert isinstance(record.scale, torch.Tensor)
        assert record.codes.numel() == torch.Size(record.shape).numel()
        assert record.scale.numel() == -(-record.codes.numel() // block)
    ids = torch.arange(8)[None]
    expected, found = (p(input_ids=ids)["logits"] for p in (model, program))
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_block_with_an_outlier_keeps_its_small_values() -> None:
    """Fails if the map is replaced by even steps."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * 0.01
    weight[:, 7] = 3.0
    small = torch.arange(512) != 7
    errors = [
        float((q.dequantize() - weight)[:, small].norm() / weight[:, small].norm())
        for q in (quantize_dynamic(weight, 512), QTensor.quantize(weight, Scheme.parse("int8:g512")))
    ]
    assert errors[0] < 0.1 * errors[1]


def test_its_codes_are_no_floats_of_8_bits() -> None:
    """A checkpoint or kernel for e4m3 would read other values."""
    record = quantize_dynamic(torch.randn(64, 128), 64)
    assert torch.equal(record.codebook, dynamic_map())
    assert record.scheme.code == "nf"
    for name in ("compressed-tensors", "gptq", "awq", "bitsandbytes"):
        form = lookup("formats", name)
        assert held_kinds(form)
        assert not form.holds(record)


def test_a_block_of_another_size_is_refused() -> None:
    with pytest.raises(RecipeError, match="dynamic8: block is 48; it must be one of 32, 64"):
        Dynamic8(block=48).run(None, None)  # type: ignore[arg-type]
