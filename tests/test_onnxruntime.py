"""The backend onnxruntime: what it gives is what the program means, on every path it can take."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompiler.errors import BackendError, No
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.kv_cache import KvCache
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from qcompiler.target import refusals_of
from tests.programs import Sketch, tiny_encoder, tiny_llama

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from qcompiler.backends.onnxruntime import OnnxRuntime  # noqa: E402

aten = torch.ops.aten
EXACT = OnnxRuntime(accuracy_level=0, threads=1)
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def decoder_program(fuse: bool = True, quantize: Any = None, **options: Any) -> Program:
    """A tiny llama as the recipes leave it."""
    program = tiny_llama(**options)
    if fuse:
        Fuse().run(program, Context())
    if quantize is not None:
        for name in [n for n in program.tensors if "proj.weight" in n or "embed" in n]:
            program.quantize_tensor(name, quantize(program.tensors[name]))
    KvCache().run(program, Context())
    program.clean()
    return program


def rounded(scheme: str) -> Any:
    return lambda weight: QTensor.quantize(weight, Scheme.parse(scheme))


def with_minima(scheme: str) -> Any:
    """Codes with float minima that no integer zero point could stand for."""

    def quantize(weight: Tensor) -> QTensor:
        q = QTensor.quantize(weight, Scheme.parse(scheme))
        assert q.zero is not None
        assert isinstance(q.scale, Tensor)
        return q.with_parts(zero=None, minimum=-(q.zero.float() + 0.37) * q.scale.float())

    return quantize


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any output."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())


def check(program: Program, tolerance: float = 2e-6) -> dict[str, Any]:
    """Whole calls and decoding in pieces, against the program itself; returns the details."""
    assert list(refusals_of(program, EXACT)) == []
    runner = EXACT.lower(program)
    whole = program(input_ids=IDS)
    assert error(runner({"input_ids": IDS}), whole) < tolerance
    if program.caches:
        decoder = runner.decoder(2, 16)
        at = 0
        for size in (4, 1, 3, 1):  # a prefill, a step, several over a past, a step
            at += size
            logits = decoder.step(IDS[:, at - size : at])
            torch.testing.assert_close(logits, whole["logits"][:, at - 1], rtol=tolerance, atol=10 * tolerance)
    return runner.details()


def operators(details: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = details["nodes"]
    return found


# -- whole programs --------------------------------------------------------------------------------------------


def test_an_encoder_with_padding() -> None:
    program = tiny_encoder()
    details = check(program)
    assert operators(details)["Sum"] == 2  # Add would become SkipLayerNormalization, which is slow
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    assert error(EXACT.lower(program)(inputs), program(**inputs)) < 2e-6


def test_a_decoder_without_cache() -> None:
    check(tiny_llama())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fuse": False},
        {"bias": True},
        {"qk_norm": True},
        {"window": 3},
        {"softcap": 2.0},
        {"sinks": True},
        {"softcap": 2.0, "sinks": True, "window": 4},
        {"rotary": 8},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"tied": False},
    ],
    ids=str,
)
def test_a_decoder_is_group_query_attention_and_fused_norms(options: dict[str, Any]) -> None:
    details = check(decoder_program(**options))
    assert operators(details)["GroupQueryAttention"] == 2
    assert operators(details)["SkipSimplifiedLayerNormalization"] == 4
    assert operators(details)["QuickGelu"] == 2


def test_the_usual_decoder_has_no_spare_node() -> None:
    details = check(decoder_program())
    usual = {"MatMul": 8, "FusedMatMul": 1, "SkipSimplifiedLayerNormalization": 4, "GroupQueryAttention": 2, "Split": 2}
    lengths = {"ReduceSum": 1, "Sub": 1, "Shape": 1, "Squeeze": 1, "Cast": 2}  # from the padding mask, once
    assert operators(details) == usual | {"QuickGelu": 2, "Mul": 2, "Gather": 2, "RMSNormalization": 1} | lengths
    assert details["refusals"] == []


def test_fused_norms_make_nothing_that_nobody_reads(tmp_path: Path) -> None:
    EXACT.lower(decoder_program(), tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    outputs = [list(node.output) for node in nodes if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert [[bool(name) for name in names] for names in outputs] == [[True, False, False, True]] * 4


@pytest.mark.parametrize("first", [1, 2])
def test_decoding_in_a_buffer_longer_than_what_is_read(first: int) -> None:
    program = decoder_program()
    decoder = EXACT.lower(program).decoder(1, 64)
    ids = IDS[:1]
    steps = [decoder.step(ids[:, :first]), *(decoder.step(ids[:, i : i + 1]) for i in range(first, ids.shape[1]))]
    expected = program(input_ids=ids)["logits"][0, first - 1 :]
    assert error({"logits": torch.cat(steps)}, {"logits": expected}) < 2e-6


def test_the_most_likely_tokens_are_chosen_in_the_graph() -> None:
    program = decoder_program()
    session = replace(EXACT, top=3).lower(program).session  # type: ignore[attr-defined]
    binding = session.io_binding()
    for i in session.get_inputs():
        shape = (2, 2, 0, 16) if "past" in i.name else tuple(IDS.shape)
        value = {"input_ids": IDS.numpy(), "attention_mask": np.ones(shape, np.int64)}.get(i.name)
        binding.bind_cpu_input(i.name, np.zeros(shape, np.float32) if value is None else value)
    binding.bind_output("top_ids")
    binding.bind_output("top_logits")
    session.run_with_iobinding(binding)
    ids, logits = binding.copy_outputs_to_cpu()
    expected = program(input_ids=IDS)["logits"][:, -1:].topk(3)
    assert ids.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(logits, expected.values.numpy(), rtol=1e-5, atol=2e-5)


def test_heads_that_group_query_attention_cannot_hold() -> None:
    details = check(decoder_program(head_dim=12))
    assert "GroupQueryAttention" not in operators(details)
    assert any("multiple of 8 channels, not 12" in text for text in details["refusals"])


def test_positions_that_the_graph_cannot_take() -> None:
    with pytest.raises(BackendError, match="positions counted from the past"):
        EXACT.lower(decoder_program())({"input_ids": IDS, "position_ids": torch.full_like(IDS, 3)})


# -- quantized weights -----------------------------------------------------------------------------------------

SCHEMES = ["int2:g16", "int2:g64:asym", "int3:g32", "int3:g32:asym", "int4:g32", "int4:g64:asym", "int5:g32:asym"]
SCHEMES += ["int6:g16", "int8:g32", "int8:g32:asym", "int8:channel", "int4:channel:asym", "int4:tensor", "int4:g48"]


@pytest.mark.parametrize("hidden", [64, 80])  # 80: the last group of a row is shorter
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integer_codes_are_carried_exactly(scheme: str, hidden: int) -> None:
    details = check(decoder_program(quantize=rounded(scheme), layers=1, hidden=hidden))
    assert details["kernels"] == {"GatherBlockQuantized": 1, "MatMulNBits": 5, "GroupQueryAttention": 1}
    assert operators(details)["MatMulNBits"] == 5


@pytest.mark.parametrize("hidden", [64, 80])
@pytest.mark.parametrize("scheme", ["int4:g32:asym", "int3:g16:asym", "int8:g32:asym"])
def test_float_minima_are_never_rounded(scheme: str, hidden: int) -> None:
    details = check(decoder_program(quantize=with_minima(scheme), layers=1, hidden=hidden))
    assert details["kernels"]["MatMulNBits + block sums"] == 5
    assert details["kernels"]["GatherBlockQuantized + minima"] == 1
    assert any("MatMulNBits: has a minimum" in text for text in details["refusals"])


def test_groups_of_unequal_size() -> None:
    def quantize(weight: Tensor) -> QTensor:
        q = QTensor.quantize(weight, Scheme.parse("int4:g32"))
        if weight.shape[1] != 96:
            return q
        edges = torch.tensor([0, 16, 64, 96], dtype=torch.int32)
        scale = q.scale
        assert isinstance(scale, Tensor)
        return q.with_parts(boundaries=edges, scale=scale)

    details = check(decoder_program(quantize=quantize, layers=1, mlp=96))
    assert details["kernels"]["MatMulNBits"] == 5


def test_columns_in_another_order() -> None:
    def quantize(weight: Tensor) -> QTensor:
        q = QTensor.quantize(weight, Scheme.parse("int4:g32:asym"))
        if weight.shape[1] != 96:
            return q
        order = torch.randperm(96, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        return q.with_parts(permutation=order)

    check(decoder_program(quantize=quantize, layers=1, mlp=96))


@pytest.mark.parametrize(
    ("quantize", "reason"),
    [
        (rounded("int4:g24"), "groups of 24 are not whole blocks of 16 or 32"),
        (
            lambda w: rounded("int4:g32")(w).with_parts(codebook=torch.linspace(-2, 2, 16) ** 3 / 64),
            "its codes stand for the entries of a codebook",
        ),
    ],
)
def test_what_block_operators_cannot_hold_is_written_as_floats_and_said(quantize: Any, reason: str) -> None:
    details = check(decoder_program(quantize=quantize, layers=1))
    assert details["kernels"]["MatMul (dequantized when written)"] == 5
    assert any(reason in text for text in details["refusals"])


@pytest.mark.parametrize("quantize", [None, rounded("int8:g32")], ids=["float", "int8"])
def test_a_tied_table_is_stored_once(tmp_path: Path, quantize: Any) -> None:
    program = decoder_program(quantize=quantize, layers=1, vocabulary=4000)
    replace(EXACT, max_positions=64).lower(program, tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size < program.nbytes * 1.2


def test_eight_bit_activations_are_close() -> None:
    program = decoder_program(quantize=rounded("int4:g32"))
    fast = OnnxRuntime(accuracy_level=4, threads=1).lower(program)({"input_ids": IDS})["logits"]
    exact = program(input_ids=IDS)["logits"]
    assert 1e-6 < float((fast - exact).norm() / exact.norm()) < 0.03


# -- files -----------------------------------------------------------------------------------------------------


def test_files_reload_to_the_same_bits(tmp_path: Path) -> None:
    program = decoder_program(quantize=rounded("int4:g32:asym"))
    first = EXACT.lower(program, tmp_path)({"input_ids": IDS})
    files = ["genai_config.json", "model.onnx", "model.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    runner = EXACT.load(program, tmp_path)
    again = runner({"input_ids": IDS})
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert runner.details()["kernels"]["MatMulNBits"] == 9


def test_the_same_program_gives_the_same_files(tmp_path: Path) -> None:
    for name in "ab":
        EXACT.lower(decoder_program(quantize=rounded("int4:g32:asym")), tmp_path / name)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_checker_accepts_standard_operators(tmp_path: Path) -> None:
    EXACT.lower(tiny_llama(), tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_a_damaged_file_is_an_error_of_ours(tmp_path: Path) -> None:
    program = tiny_encoder()
    EXACT.lower(program, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BackendError, match=r"does not open model\.onnx"):
        EXACT.load(program, tmp_path)


# -- refusals --------------------------------------------------------------------------------------------------


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    sk = Sketch()
    x = sk.input("x", ("batch", 4), torch.float32)
    program = sk.done(y=sk.call(aten.digamma.default, x, to=("batch", 4)))
    (no,) = refusals_of(program, EXACT)
    assert "aten.digamma" in str(no)
    with pytest.raises(BackendError, match=r"cannot run node .*aten\.digamma"):
        EXACT.lower(program)


def test_a_dtype_without_kernels_is_refused_by_name() -> None:
    sk = Sketch()
    x = sk.input("x", ("batch", 4), torch.float32)
    program = sk.done(y=sk.call(aten._to_copy.default, x, to=("batch", 4), dtype=torch.bfloat16))
    (no,) = refusals_of(program, EXACT)
    assert "bfloat16" in str(no)


def test_a_decoder_needs_a_cache_and_has_a_capacity() -> None:
    with pytest.raises(BackendError, match="add the pass kv_cache"):
        EXACT.lower(tiny_llama()).decoder(1, 8)
    decoder = EXACT.lower(decoder_program()).decoder(2, 8)
    with pytest.raises(BackendError, match="more than this decoder's 8"):
        decoder.step(IDS)


def test_positions_beyond_the_rotary_tables() -> None:
    runner = replace(EXACT, max_positions=8).lower(decoder_program())
    with pytest.raises(BackendError, match="max_positions"):
        runner.decoder(1, 9)
    with pytest.raises(BackendError, match="max_positions"):
        runner({"input_ids": IDS})


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = OnnxRuntime().available()
    assert isinstance(answer, No)
    assert 'pip install "qcompiler[onnx]"' in str(answer)
    with pytest.raises(BackendError, match="pip install"):
        OnnxRuntime().lower(tiny_encoder())


def test_importing_the_backend_imports_no_optional_package() -> None:
    code = (
        "import sys, json, qcompiler.backends; "
        "print(json.dumps([m for m in ('onnx', 'onnx_ir', 'onnxruntime') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(found.stdout) == []
