"""GGUF files written here: the same bytes for the same codes, and llama.cpp computes what we compute."""

from pathlib import Path

import numpy as np
import pytest
import torch

import qcompiler
from qcompiler import artifact
from qcompiler.convert import convert
from qcompiler.data import check_samples
from qcompiler.errors import InputError
from qcompiler.formats import gguf_types, gguf_write
from qcompiler.formats.gguf import GgufFile
from qcompiler.formats.gguf_names import gguf_name, processor_of, row_order
from qcompiler.frontends import gguf as frontend
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.scheme import QTensor, Scheme
from tests.programs import tiny_llama
from tests.test_gguf import VOCABULARY, smollm2, write_model

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

IDS = [7, 30, 101, 5, 64, 12]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def captured(source: Path) -> Program:
    return frontend.capture(source)


def compiled(program: Program, recipe: str) -> Program:
    program = program.copy()
    Runner(Context(), check_samples(program)).run(program, Recipe.parse(recipe).passes)
    return program


def same_bytes(one: Path, other: Path) -> None:
    first, second = GgufFile.read(one), GgufFile.read(other)
    assert list(first.tensors) == list(second.tensors)
    for name, stored in first.tensors.items():
        assert (second.tensors[name].kind, second.tensors[name].shape) == (stored.kind, stored.shape), name
        assert np.array_equal(first.raw(name), second.raw(name)), name


def test_convert_writes_a_compiled_folder_as_gguf(source: Path, tmp_path: Path) -> None:
    qcompiler.compile(source, "kquant-w4a16", calibration=[torch.tensor([IDS])]).save(tmp_path / "out")
    lines = convert(tmp_path / "out", tmp_path / "out.gguf", "gguf", verify=True)
    assert {line.note for line in lines} > {"F32"}
    assert all(line.outcome == "lossless" for line in lines)
    again = frontend.capture(tmp_path / "out.gguf")
    before = artifact.load(tmp_path / "out").program(input_ids=torch.tensor([IDS]))["logits"]
    torch.testing.assert_close(again(input_ids=torch.tensor([IDS]))["logits"], before, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="exists; give the name of a new file"):
        convert(tmp_path / "out", tmp_path / "out.gguf", "gguf")
    with pytest.raises(InputError, match="quantized by a recipe"):
        convert(tmp_path / "out", tmp_path / "new.gguf", "gguf", requantize=True)


def test_verification_finds_a_value_that_changed(captured: Program, tmp_path: Path) -> None:
    program = compiled(captured, "stored")
    gguf_write.write(program, tmp_path / "out.gguf")
    name = next(name for name in program.tensors if name.endswith("norm.weight"))
    program.tensors[name] = program.tensors[name] + 1
    with pytest.raises(InputError, match="verification failed"):
        gguf_write.compare(program, tmp_path / "out.gguf")


@pytest.mark.parametrize("recipe", ["canonicalize, carry, pack", "stored"])
def test_stored_codes_come_out_as_they_went_in(captured: Program, source: Path, recipe: str, tmp_path: Path) -> None:
    """Also after `fuse`, which puts the rows of queries, keys and values into one tensor."""
    gguf_write.write(compiled(captured, recipe), tmp_path / "out.gguf", floats="F16")
    same_bytes(source, tmp_path / "out.gguf")
    before, after = GgufFile.read(source), GgufFile.read(tmp_path / "out.gguf")
    assert before.metadata.items() <= after.metadata.items()
    assert before.types.items() <= after.types.items()
    assert set(after.metadata) - set(before.metadata) <= {"general.file_type", "general.quantization_version"}


def test_the_file_is_the_model(captured: Program, tmp_path: Path) -> None:
    program = compiled(captured, "canonicalize, rtn{scheme=int4:g32}, fuse, pack")
    kinds = gguf_write.write(program, tmp_path / "out.gguf")
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"
    again = compiled(frontend.capture(tmp_path / "out.gguf"), "stored")
    ids = torch.tensor([IDS])
    torch.testing.assert_close(again(input_ids=ids)["logits"], program(input_ids=ids)["logits"], rtol=1e-5, atol=1e-5)
    number = GgufFile.read(tmp_path / "out.gguf").metadata["general.file_type"]
    assert gguf.LlamaFileType(number).name == "MOSTLY_Q4_0"


@pytest.mark.parametrize("recipe", ["canonicalize", "stored", "canonicalize, rtn{scheme=int4:g64}, fuse, pack"])
def test_llama_cpp_computes_what_we_compute(captured: Program, recipe: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits before a quantized product, and keys and values to float16 always."""
    from tests.llama_cpp import LlamaCpp

    program = compiled(captured, recipe)
    gguf_write.write(program, tmp_path / "out.gguf")
    theirs = LlamaCpp(tmp_path / "out.gguf").logprobs(IDS, VOCABULARY)
    ours = program(input_ids=torch.tensor([IDS]))["logits"][0, -1].log_softmax(-1).numpy()
    assert np.abs(theirs - ours).max() < (5e-3 if recipe == "canonicalize" else 0.05)
    wrong = np.random.default_rng(0).permutation(ours)
    assert np.abs(theirs - wrong).max() > 0.2  # the distance tells models apart


@pytest.mark.slow
def test_smollm2_says_the_same_in_llama_cpp(tmp_path: Path) -> None:
    """The stored codes, and the floats they stand for: with those llama.cpp does not round activations to 8 bits."""
    from tests.llama_cpp import LlamaCpp

    program = frontend.capture(smollm2())
    stored, floats = tmp_path / "stored.gguf", tmp_path / "floats.gguf"
    gguf_write.write(compiled(program, "stored"), stored)
    gguf_write.write(program, floats)
    same_bytes(smollm2(), stored)
    ids = [504, 3575, 282, 4649, 314]  # The capital of France is
    for path, gap, divergence in ((floats, 0.02, 1e-5), (stored, 0.5, 5e-3)):
        model = LlamaCpp(path)
        said = model.greedy(ids, 32)
        assert len(said) == 32
        logits = program(input_ids=torch.tensor([ids + said]))["logits"][0, len(ids) - 1 : -1]
        ours = logits[0].log_softmax(-1).numpy()
        assert float((np.exp(ours) * (ours - model.logprobs(ids, 49152))).sum()) < divergence
        logits[:, [0, 2]] = -torch.inf  # the ends of texts, which llama.cpp is told to ignore
        chosen = logits.gather(1, torch.tensor(said)[:, None])[:, 0]
        assert float((logits.amax(1) - chosen).max()) < gap  # the same token each time, but for ties
        assert int((logits.argmax(1) == torch.tensor(said)).sum()) >= 30


def test_rows_of_queries_go_back_to_where_llama_cpp_wants_them(source: Path) -> None:
    file = GgufFile.read(source)
    order = row_order(processor_of(file), "blk.0.attn_q.weight", 64)
    assert isinstance(order, np.ndarray)
    assert not np.array_equal(order, np.arange(64))
    assert sorted(order) == list(range(64))
    plain = row_order(processor_of(file), "blk.0.attn_v.weight", 32)
    assert isinstance(plain, np.ndarray)
    assert np.array_equal(plain, np.arange(32))


def test_a_reader_that_changes_values_is_not_undone() -> None:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    for architecture, name in (("gemma2", "output_norm.weight"), ("gpt2", "blk.0.ffn_up.weight")):
        answer = row_order(TENSOR_PROCESSORS[architecture]({}), name, 8)
        assert not isinstance(answer, np.ndarray)
        assert "does more to it" in answer.reason


def test_names_come_from_gguf_py_where_there_is_no_file() -> None:
    assert gguf_name("model.layers.3.mlp.down_proj.weight") == "blk.3.ffn_down.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("nobody.knows.weight") == ""


def test_refusals(captured: Program, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(InputError, match="a GGUF file needs metadata and a tokenizer"):
        gguf_write.write(tiny_llama(), out)
    with pytest.raises(InputError, match='floats="F64" is none of F32, F16'):
        gguf_write.write(captured, out, floats="F64")
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight.*groups of 16"):
        gguf_write.write(compiled(captured, "canonicalize, rtn{scheme=int4:g16}"), out)
    with pytest.raises(InputError, match=r"rounded activations, which llama\.cpp's graph has no place for"):
        gguf_write.write(compiled(captured, "canonicalize, activations{include=*mlp*}"), out)
    moved = captured.copy()
    moved.info["gguf"]["file"] = str(tmp_path / "gone.gguf")
    with pytest.raises(InputError, match=r"gone\.gguf.*is gone; put it back"):
        gguf_write.write(moved, out)
    small = captured.copy()
    name = small.info["gguf"]["names"]["blk.0.ffn_up.weight"]
    small.tensors[name] = small.tensors[name][:32]
    with pytest.raises(InputError, match=r"has become \[32, 64\]"):
        gguf_write.write(small, out)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(captured: Program, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    program = compiled(captured, "canonicalize, rtn{scheme=int4:g32}")
    name = next(iter(program.quantized))
    record = program.qtensor(name)
    program.replace_qtensor(name, record.with_parts(scale=record.scale.float() * 1.0001))
    with pytest.raises(InputError, match="finer than float16"):
        gguf_write.write(program, out)
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_scales_of_two_levels_are_fused_and_taken_apart(kind: str) -> None:
    from qcompiler.formats.joined import members
    from qcompiler.passes.fuse import Fuse
    from tests.test_gguf_types import blocks_of

    program = tiny_llama(hidden=256)
    before = {}
    for i, n in enumerate("qkv"):
        name = f"model.layers.0.self_attn.{n}_proj.weight"
        rows, columns = program.tensors[name].shape
        data = torch.from_numpy(blocks_of(kind, rows, columns // 256, i))
        before[name] = gguf_types.decode(kind, data, (rows, columns))
        program.quantize_tensor(name, before[name])
    context = Context()
    Fuse().run(program, context)
    assert "model.layers.0.self_attn.qkv_proj.weight" in program.quantized
    after = dict(members(program))
    for name, record in before.items():
        found = after[name]
        assert isinstance(found, QTensor)
        assert torch.equal(found.dequantize(), record.dequantize())
        assert found.spec() == record.spec()


def test_scales_quantized_otherwise_are_not_fused() -> None:
    from qcompiler.passes.fuse import may_stack

    flat = QTensor.quantize(torch.rand(1, 8), Scheme.parse("int8:g4"))
    weight = QTensor.quantize(torch.randn(4, 64), Scheme.parse("int4:g32")).with_parts(scale=flat)
    answer = may_stack([weight, weight])
    assert not answer
    assert "not row by row" in answer.reason
