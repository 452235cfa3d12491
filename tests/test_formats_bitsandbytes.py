"""bitsandbytes: codes and scales equal to its library's to the bit, and checkpoints in both directions."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qcompiler.codebooks import BLOCKS, codebook, dynamic_map, quantize_blocks, quantize_dynamic
from qcompiler.compiler import compile
from qcompiler.errors import InputError, No, RecipeError
from qcompiler.evaluate import encode, perplexity
from qcompiler.formats import bitsandbytes as form
from qcompiler.scheme import QTensor, Scheme
from qcompiler.source import demo_model
from qcompiler.torch_model import to_torch
from tests.checkpoints import ids, llama, session, written

library = pytest.importorskip("bitsandbytes", reason="the extra [dev] is not installed")

REST = "fuse, kv_cache, pack"


def test_the_tables_are_theirs() -> None:
    for kind in form.KINDS:
        assert torch.equal(codebook(kind), library.functional.get_4bit_type(kind, device="cpu"))
    assert torch.equal(dynamic_map(), library.functional.create_dynamic_map())


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(form.KINDS),
    block=st.sampled_from(BLOCKS),
    double=st.booleans(),
    shape=st.sampled_from(((64, 576), (7, 100), (33, 65), (1, 1), (300, 64), (96, 512))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 999),
)
def test_codes_and_scales_equal_theirs_to_the_bit(
    kind: str, block: int, double: bool, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0] = 0
    codes, state = library.functional.quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=double
    )
    record = quantize_blocks(weight, kind, block, double)
    halves = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=-1).flatten()
    assert torch.equal(record.unpacked().flatten(), halves[: weight.numel()])
    if double:
        scale = record.scale
        assert isinstance(scale, QTensor)
        assert torch.equal(scale.codes.flatten(), state.absmax)
        assert torch.equal(scale.scale.flatten(), state.state2.absmax)
        assert scale.minimum.item() == state.offset.item()
    else:
        assert torch.equal(record.scale.flatten(), state.absmax)
    if weight.shape[1] % block == 0:  # their CPU library decodes no blocks that cross rows right
        assert torch.equal(record.dequantize(), library.functional.dequantize_4bit(codes, state))


@example(block=256, shape=(64, 576), dtype=torch.float16, tail=1, seed=51)  # 0.4796825 of the largest, nearly a tie
@settings(max_examples=40, deadline=None)
@given(
    block=st.sampled_from(BLOCKS),
    shape=st.sampled_from(((64, 576), (7, 100), (33, 65), (1, 1), (300, 64), (96, 512))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    tail=st.sampled_from((1, 3)),
    seed=st.integers(0, 999),
)
def test_codes_of_8_bits_equal_theirs_to_the_bit(
    block: int, shape: tuple[int, int], dtype: torch.dtype, tail: int, seed: int
) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** tail).to(dtype)
    weight[0] = 0
    codes, state = library.functional.quantize_blockwise(weight, blocksize=block)
    record = quantize_dynamic(weight, block)
    assert torch.equal(record.unpacked().flatten(), codes.flatten())
    assert torch.equal(record.scale.flatten(), state.absmax)
    assert torch.equal(record.dequantize(), library.functional.dequantize_blockwise(codes, state))


def test_blocks_that_cross_rows_stand_for_the_nearest_values() -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    record = quantize_blocks(weight, "nf4", 64)
    assert record.axis is None
    blocks = weight.flatten()[:448].view(7, 64)
    peaks = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / peaks)[..., None].sub(codebook("nf4")).abs().argmin(-1)
    assert torch.allclose(record.dequantize().flatten()[:448].view(7, 64), codebook("nf4")[nearest] * peaks)
    again = QTensor.from_parts(record.parts(), record.spec())
    assert torch.equal(again.dequantize(), record.dequantize())


SLOW = pytest.mark.slow
STEPS = [
    "nf4{block=32 double=true}",
    *(pytest.param(s, marks=SLOW) for s in ("fp4{block=32}", "rtn{scheme=int8:channel}")),
]


@pytest.mark.parametrize("steps", STEPS)
def test_transformers_holds_our_weights_to_the_bit(steps: str, tmp_path: Path) -> None:
    """Its CPU kernels multiply in bfloat16 or round what they read, so weights are compared, and logits roughly."""
    from transformers import AutoModelForCausalLM

    compiled = session(f"canonicalize, {steps}, {REST}")
    folder = written(compiled, "bitsandbytes", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    layer = model.model.layers[1].mlp.up_proj
    found = form.read(folder).tensors["model.layers.1.mlp.up_proj.weight"].dequantize()
    if "rtn" in steps:
        theirs = layer.weight.data * (layer.weight.SCB[:, None] * form.SEVENTH)
    else:
        theirs = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(theirs, found)
    with torch.no_grad():
        logits = model(ids()).logits
    expected = compiled(ids())
    assert float((logits - expected).norm() / expected.norm()) < 0.02
    assert torch.equal(compile(folder, "stored", backend="reference")(ids()), expected)


@pytest.mark.parametrize("double", [False, True])
def test_what_transformers_writes_is_read(double: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "float")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "nf4")
    tensors = form.read(tmp_path / "nf4").tensors
    names = [name for name in tensors if name.endswith("_proj.weight")]
    assert len(names) == 14
    for name in names:
        record = tensors[name]
        expected = quantize_blocks(llama().get_parameter(name), "nf4", 64, double)
        assert isinstance(record, QTensor)
        assert record.spec() == expected.spec()
        assert all(torch.equal(a, b) for a, b in zip(record.parts().values(), expected.parts().values(), strict=True))


def small(folder: Path) -> Tensor:
    """Writes a model whose rows are whole blocks of 64; returns ids to predict."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96, pad_token_id=0)).save_pretrained(folder)
    return torch.randint(1, 96, (64,), generator=torch.Generator().manual_seed(1))


def smollm2(folder: Path) -> Tensor:
    """Writes the demo's model in float32; returns ids to predict."""
    compiled = compile(demo_model(), "float", backend="reference")
    to_torch(compiled).save_pretrained(folder)
    return encode(compiled.tokenizer, (files("qcompiler") / "demo_text.txt").read_text(encoding="utf-8"))[:512]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("model", [small, pytest.param(smollm2, marks=SLOW)])
def test_the_perplexity_is_theirs(model: Callable[[Path], Tensor], double: bool, tmp_path: Path) -> None:
    """Where its layers multiply in float32: on CPUs with bfloat16 instructions they would otherwise use these."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tokens = model(tmp_path)
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": torch.float32}
    how = BitsAndBytesConfig(load_in_4bit=True, **kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32).eval()
    for module in theirs.modules():
        if isinstance(module, library.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    compiled = compile(tmp_path, f"canonicalize, nf4{{double={str(double).lower()}}}, fuse, pack", backend="reference")
    floats = compile(tmp_path, "canonicalize", backend="reference")
    ours, expected, unrounded = (
        perplexity(run, tokens, 64) for run in (compiled, lambda x: theirs(input_ids=x).logits, floats)
    )
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours != pytest.approx(unrounded, rel=1e-4)  # the distance tells models apart


def layer(double: bool = True) -> dict[str, Tensor]:
    return form.pack("x", quantize_blocks(torch.randn(32, 64), "nf4", 32, double))


def state(**changes: object) -> dict[str, Tensor]:
    """The state of a weight with something else in it."""
    name = f"x.{form.STATE}nf4"
    facts = json.loads(bytes(layer()[name].numpy())) | changes
    return {name: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (state(shape=[2**40, 64]), "is not the state of a quantized matrix"),
        (state(shape=[64, 64]), "do not fit its 64 x 64 values"),
        (state(blocksize=48), "is not the state of a quantized matrix"),
        (state(nested_offset=None), "scales of .* do not fit together"),
        (state(nested_offset=float("nan")), "not finite numbers"),
        ({"x.weight.nested_absmax": torch.full((1,), torch.inf)}, "not finite numbers"),
        ({"x.weight.absmax": torch.zeros(3, dtype=torch.uint8)}, "do not fit"),
        ({f"x.{form.STATE}nf4": torch.zeros(9, dtype=torch.uint8)}, "is not the state of a quantized matrix"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    options = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": options}))
    save_file({name: part.contiguous() for name, part in (layer() | change).items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        form.read(tmp_path).tensors["x.weight"]


def test_what_it_cannot_hold_is_refused() -> None:
    record = QTensor.quantize(torch.randn(32, 64), Scheme.parse("int4:g32"))
    assert isinstance(form.holds(record), No)
    with pytest.raises(InputError, match="8-bit weights have one scale a row"):
        form.pack("x", record)
    with pytest.raises(InputError, match=r"its codebook .nf4. is not bitsandbytes'"):
        form.pack("x", quantize_blocks(torch.randn(32, 64), "nf4", 32).with_parts(codebook=torch.linspace(-1, 1, 16)))


def test_a_block_of_another_size_is_refused() -> None:
    with pytest.raises(RecipeError, match="blocks of 48 values; the sizes are 32, 64"):
        quantize_blocks(torch.randn(4, 48), "nf4", 48)
    with pytest.raises(InputError, match="empty, or holds NaN"):
        quantize_blocks(torch.full((4, 32), torch.nan), "nf4", 32)
