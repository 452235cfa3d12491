"""GPTQModel: it packs the same bits, and transformers with it computes our logits."""

from pathlib import Path

import pytest
import torch

from qcompiler.formats import gptq
from qcompiler.scheme import QTensor, Scheme
from tests.checkpoints import ids, logits_of, session, written

pytest.importorskip("gptqmodel", reason="GPTQModel has an environment of its own: make test-clients")


@pytest.mark.parametrize(("kind", "form"), [("sym", "gptq"), ("asym", "gptq-v2")])
def test_it_computes_our_logits(kind: str, form: str, tmp_path: Path) -> None:
    from transformers import GPTQConfig

    compiled = session(f"canonicalize, rtn{{scheme=int4:g32:{kind}}}, fuse, kv_cache, pack")
    folder = written(compiled, form, tmp_path / "out")
    plain = GPTQConfig(bits=4, backend="torch")  # its other kernels are compiled on the spot, for minutes
    found = logits_of(folder, dtype=torch.float32, quantization_config=plain)
    assert torch.allclose(found, compiled(ids()), atol=1e-3)  # it decodes weights in float16


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
    theirs = TorchLinear(bits, 32, False, ordered, 96, 64)
    assert record.zero is not None
    theirs.pack_original(linear, record.scale, record.zero.float(), ours["x.g_idx"])
    for part in gptq.PARTS:
        assert torch.equal(getattr(theirs, part), ours[f"x.{part}"]), part
