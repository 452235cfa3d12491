"""GPTQModel: it packs the same bits, computes our logits, and what it quantizes by itself computes its logits here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.compiler import capture
from qcompiler.formats import gptq
from qcompiler.scheme import QTensor, Scheme
from tests.checkpoints import VOCABULARY, ids, llama, logits_of, save_tokenizer, session, written

pytest.importorskip("gptqmodel", reason="GPTQModel has an environment of its own: make test-clients")

GROUP = 32
# Its other kernels for CPUs are compiled on the spot, for minutes.
KERNELS = {"gptq": "torch", "awq": "torch_awq"}


def theirs(folder: Path, method: str) -> Tensor:
    """The logits of transformers with GPTQModel's kernel; it decodes weights in float16."""
    from transformers import AwqConfig, GPTQConfig

    plain = (AwqConfig if method == "awq" else GPTQConfig)(bits=4, group_size=GROUP, backend=KERNELS[method])
    return logits_of(folder, dtype=torch.float32, quantization_config=plain)


@pytest.mark.parametrize(("kind", "form"), [("sym", "gptq"), ("asym", "gptq-v2"), ("asym", "awq")])
def test_it_computes_our_logits(kind: str, form: str, tmp_path: Path) -> None:
    compiled = session(f"canonicalize, rtn{{scheme=int4:g{GROUP}:{kind}}}, fuse, kv_cache, pack")
    folder = written(compiled, form, tmp_path / "out")
    assert torch.allclose(theirs(folder, form.partition("-")[0]), compiled(ids()), atol=1e-3)


def test_it_has_no_kernel_for_gemv_on_a_cpu(tmp_path: Path) -> None:
    """If this fails, it has one now: put gemv among the formats above."""
    compiled = session(f"canonicalize, rtn{{scheme=int4:g{GROUP}:asym}}, fuse, kv_cache, pack")
    folder = written(compiled, "awq-gemv", tmp_path / "out")
    with pytest.raises(ValueError, match=r"Unsupported backend: .*FORMAT\.GEMV"):
        theirs(folder, "awq")


def gptq_plan() -> Any:
    from gptqmodel import QuantizeConfig

    return QuantizeConfig(bits=4, group_size=GROUP, device="cpu", offload_to_disk=False)


def awq_plan() -> Any:
    from gptqmodel.quantization.config import AWQConfig

    return AWQConfig(bits=4, group_size=GROUP, sym=False, device="cpu", offload_to_disk=False)


@pytest.mark.parametrize(("method", "plan"), [("gptq", gptq_plan), ("awq", awq_plan)])
def test_what_it_quantizes_computes_its_logits_here(
    method: str, plan: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own quantizers, on 8 rows of tokens; AWQ's wants layers whose outputs are multiples of 64."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # its pool for loading has two, and wants as many CPUs
    from gptqmodel import GPTQModel

    source, folder = tmp_path / "source", tmp_path / "quantized"
    model = llama(kv_heads=4, intermediate=128)
    model.save_pretrained(source)
    save_tokenizer(source, VOCABULARY)
    rows = [{"input_ids": ids(1, 32, seed)[0].tolist(), "attention_mask": [1] * 32} for seed in range(8)]
    quantizer: Any = GPTQModel.load(str(source), plan())
    quantizer.quantize(rows, batch_size=1)
    quantizer.save(str(folder))
    program = capture(folder)
    assert program.info["format"] == method
    assert {str(record.scheme).partition(":")[0] for record in program.codes.values()} == {"int4"}
    assert len(program.codes) == 14
    ours = program(input_ids=ids())["logits"]
    assert torch.allclose(theirs(folder, method), ours, atol=1e-3)
    with torch.no_grad():
        assert not torch.allclose(model(ids()).logits, ours, atol=1e-3)  # quantizing did something


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("ordered", [False, True])
def test_it_packs_the_same_bits(bits: int, ordered: bool) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    record = QTensor.quantize(weight, Scheme.parse(f"int{bits}:g32:asym"))
    if ordered:
        order = torch.argsort(torch.arange(96) % 3, stable=True).to(torch.int32)
        record = record.with_parts(permutation=order)
    ours = gptq.pack("x", record, 2)
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = record.dequantize()
    packer = TorchLinear(bits, 32, False, ordered, 96, 64)
    assert record.zero is not None
    packer.pack_original(linear, record.scale, record.zero.float(), ours["x.g_idx"])
    for part in gptq.PARTS:
        assert torch.equal(getattr(packer, part), ours[f"x.{part}"]), part
