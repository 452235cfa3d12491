"""to_torch: packed layers with gradients, and PEFT's adapters on top of them."""

import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.errors import InputError
from qcompiler.torch_model import QuantizedLinear, to_torch
from tests.checkpoints import ids, session

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
peft = pytest.importorskip("peft", reason="the extra [dev] is not installed")

RECIPES = {
    "QLoRA": "canonicalize, nf4{block=32 double=true}, fuse, kv_cache, pack",
    "LoRA on GPTQ": "canonicalize, gptq{scheme=int4:g32:asym}, fuse, kv_cache, pack",
}


def packed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of all quantized layers, copied."""
    return {name: b.clone() for name, b in model.named_buffers() if ".packed_" in name}


def layers(model: torch.nn.Module) -> list[QuantizedLinear]:
    """The packed layers, wrapped by PEFT or not."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def train(model: Any, steps: int = 25) -> list[float]:
    """Losses of a few steps on one batch."""
    batch = ids(2, 16, seed=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", RECIPES)
def test_an_adapter_trains_on_packed_weights(name: str, tmp_path: Path) -> None:
    compiled = session(RECIPES[name])
    base = to_torch(compiled)
    assert torch.allclose(base(ids()).logits, compiled(ids()), atol=1e-5)
    before = packed(base)
    held = sum(tensor.nbytes for layer in layers(base) for tensor in (*layer.parameters(), *layer.buffers()))
    assert held == sum(layer.record.nbytes for layer in layers(base))
    assert held < 0.2 * sum(4 * layer.in_features * layer.out_features for layer in layers(base))
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    after = packed(model)
    assert len(before) == len(after)
    assert all(torch.equal(b, a) for b, a in zip(before.values(), after.values(), strict=True))
    assert held == sum(tensor.nbytes for layer in layers(base) for tensor in (*layer.parameters(), *layer.buffers()))
    trained = model.eval()(ids()).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = peft.PeftModel.from_pretrained(to_torch(compiled), tmp_path).eval()
    assert torch.equal(again(ids()).logits, trained)
    compiled.save(tmp_path / "base")
    floats = to_torch(qcompiler.load(tmp_path / "base", "reference"), dequantize=True)
    merged = peft.PeftModel.from_pretrained(floats, tmp_path).merge_and_unload()
    assert torch.allclose(merged(ids()).logits, trained, atol=1e-4)
    assert not torch.allclose(merged(ids()).logits, compiled(ids()), atol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RECIPES)
def test_smollm2_learns_a_text(name: str) -> None:
    """The text is the file that QCOMPILER_TEXT names, or the demo's."""
    from finetune import RECIPES, finetuned

    text = os.environ.get("QCOMPILER_TEXT") or files("qcompiler") / "demo_text.txt"
    found = finetuned(RECIPES[name], Path(str(text)), steps=30)
    losses = found["losses"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert found["same_codes"]
    assert found["decoded_weights_in_memory"] == 0
    assert found["base"]["packed_mb"] < 0.2 * found["base"]["as_floats_mb"]
    assert found["perplexity"]["merged into floats"] == pytest.approx(found["perplexity"]["trained"], rel=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_codes_is_an_error_and_not_lost(safe: bool) -> None:
    base = to_torch(session(RECIPES["QLoRA"]))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="load it onto to_torch"):
        model.merge_and_unload(safe_merge=safe)


def test_the_gradient_is_that_of_the_decoded_weight_and_nothing_decoded_is_kept() -> None:
    layer = next(m for m in to_torch(session(RECIPES["QLoRA"])).modules() if isinstance(m, QuantizedLinear))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    y.square().sum().backward()
    weight = layer.record.dequantize()
    assert torch.allclose(x.grad, 2 * (x @ weight.T) @ weight, atol=1e-4)
    assert weight.shape not in kept
    assert "nf4:g32:sym" in repr(layer)


def test_rounded_inputs_stay_rounded() -> None:
    compiled = session("canonicalize, rtn{scheme=int8:channel}, activations, fuse, kv_cache, pack", bias=True)
    assert torch.allclose(to_torch(compiled)(ids()).logits, compiled(ids()), atol=1e-5)


def test_what_no_transformers_model_computes_is_refused() -> None:
    compiled = session("canonicalize, kv{key=int8:token:asym:dynamic}, rtn{scheme=int4:g32}")
    with pytest.raises(InputError, match="compile without the pass kv"):
        qcompiler.to_torch(compiled)
