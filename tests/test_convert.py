"""convert: codes move from format to format unchanged, or the conversion is refused with the reason."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qcompiler import convert as module
from qcompiler.cli import app
from qcompiler.convert import convert, matrix, samples
from qcompiler.errors import InputError, RecipeError
from qcompiler.plugins import registry
from qcompiler.scheme import QTensor
from tests import checkpoints
from tests.checkpoints import ids, llama, session, written

RECIPE = "canonicalize, rtn{scheme=int4:g32:asym}, rtn{scheme=int8:g32 include=@head}, fuse, kv_cache, pack"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled folder, its layers fused, its tied head and embedding in 8 bits."""
    folder = tmp_path_factory.mktemp("convert") / "compiled"
    session(RECIPE, tied=True).save(folder)
    return folder


def test_a_chain_of_formats_loses_nothing(compiled: Path, tmp_path: Path) -> None:
    lines = convert(compiled, tmp_path / "1", "gptq-v2", verify=True)
    assert {line.outcome for line in lines} == {"lossless", "lossless as floats"}
    assert len(lines) == 15
    source = tmp_path / "1"
    for i, form in enumerate(("awq", "compressed-tensors", "awq-gemv", "gptq-v2"), start=2):
        assert {line.outcome for line in convert(source, tmp_path / str(i), form, verify=True)} == {"lossless"}
        source = tmp_path / str(i)
    first, last = (checkpoints.read(tmp_path / name, "gptq-v2").tensors for name in ("1", "5"))
    for name in first:
        a, b = first[name], last[name]
        assert type(a) is type(b)
        if isinstance(a, QTensor):
            assert all(torch.equal(x, y) for x, y in zip(a.parts().values(), b.parts().values(), strict=True))


def test_what_would_be_lost_is_refused_and_nothing_written(compiled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"14 of 15 tensors cannot be stored as bitsandbytes without loss, first"):
        convert(compiled, tmp_path / "out", "bitsandbytes")
    assert not (tmp_path / "out").exists()


def test_requantize_says_the_error(compiled: Path, tmp_path: Path) -> None:
    lines = convert(compiled, tmp_path / "out", "bitsandbytes", requantize=True, verify=True)
    again = [line for line in lines if line.outcome == "requantized"]
    assert len(again) == 14
    assert all(0.01 < line.error < 0.2 for line in again)
    read = checkpoints.read(tmp_path / "out", "bitsandbytes").tensors[again[0].name]
    before = dict(module.open_checkpoint(compiled).tensors.items())[again[0].name].dequantize()
    error = float((read.dequantize() - before).norm() / before.norm())
    assert error == pytest.approx(again[0].error, rel=1e-5)


def test_layers_unlike_the_others_are_refused_or_made_alike(tmp_path: Path) -> None:
    mixed = session("canonicalize, rtn{scheme=int4:g32 include=*.mlp.*}, rtn{scheme=int8:channel include=*attn*}")
    written(mixed, "compressed-tensors", tmp_path / "mixed")
    with pytest.raises(InputError, match=r"6 of 14 .* it is int4:g32:sym, most others int8"):
        convert(tmp_path / "mixed", tmp_path / "out", "gptq")
    lines = convert(tmp_path / "mixed", tmp_path / "out", "gptq", requantize=True)
    assert sorted({line.outcome for line in lines}) == ["lossless", "requantized"]


def test_a_float_model_is_quantized_only_when_asked(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    with pytest.raises(InputError, match="nothing in the model is quantized; compile it with a recipe first"):
        convert(tmp_path / "float", tmp_path / "out", "gptq")
    lines = convert(tmp_path / "float", tmp_path / "out", "gptq", requantize=True)
    assert {line.outcome for line in lines} == {"requantized"}


def test_what_no_checkpoint_can_say_is_refused(tmp_path: Path) -> None:
    session("canonicalize, rtn{scheme=int4:g32}, activations, kv_cache").save(tmp_path / "rounded")
    with pytest.raises(InputError, match="stores weights alone; use compressed-tensors"):
        convert(tmp_path / "rounded", tmp_path / "out", "gptq")
    with pytest.raises(RecipeError, match='there is no format "gguff"'):
        convert(tmp_path / "rounded", tmp_path / "out", "gguff")
    with pytest.raises(InputError, match="exists and is not empty"):
        convert(tmp_path / "rounded", tmp_path / "rounded", "gptq")


def test_verification_finds_a_changed_value() -> None:
    one = {"a": lambda: torch.ones(3)}
    module.compare(one, {"a": torch.ones(3)})
    with pytest.raises(InputError, match='"a" does not have the values it had'):
        module.compare(one, {"a": torch.tensor([1.0, 1.0, 1.0000001])})
    with pytest.raises(InputError, match='"b" is in one of source and result only'):
        module.compare(one, {"a": torch.ones(3), "b": torch.ones(1)})


def test_the_command_line(compiled: Path, tmp_path: Path) -> None:
    out = CliRunner().invoke(app, ["convert", str(compiled), str(tmp_path / "a"), "--to", "gptq-v2", "--verify"])
    assert out.exit_code == 0, out.output
    assert "model.layers.0.mlp.up_proj.weight: LOSSLESS\n" in out.output
    assert "LOSSLESS AS FLOATS" in out.output
    assert "every value compared" in out.output
    shown = CliRunner().invoke(app, ["formats"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    for name in ("gptq", "gptq-v2", "awq", "awq-gemv", "compressed-tensors", "bitsandbytes", "onnx"):
        assert re.search(rf"^{name}: ", shown.output, re.MULTILINE)
    found = json.loads(CliRunner().invoke(app, ["formats", "--json"]).output)
    assert found["gptq-v2"]["lost"]["gptq"] == ["int4, zero point 0"]


def test_the_matrix_is_what_the_formats_do(tmp_path: Path) -> None:
    """Each cell by writing: a format that says it holds a weight gives its bits back, and refuses the others."""
    lost, kinds = matrix(), samples()
    config = llama(bias=False).config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    for name in lost:
        form = registry().formats[name]
        assert form.holds
        if form.write_program:  # tests/test_gguf_types.py holds its codes to gguf's decoder
            continue
        if not form.write:  # tests/test_formats_onnx.py reads back what MatMulNBits holds
            assert name == "onnx"
            continue
        for i, (kind, record) in enumerate(kinds.items()):
            weight = "model.layers.0.self_attn.q_proj.weight"
            checkpoint = checkpoints.Checkpoint(config, {weight: record})
            place = tmp_path / name / str(i)
            if form.holds(record):
                form.write(checkpoint, place)
                back = checkpoints.read(place, name).tensors[weight]
                assert torch.equal(back.dequantize(), record.dequantize()), (name, kind)
            else:
                with pytest.raises(InputError, match="cannot be stored as"):
                    form.write(checkpoint, place)


def test_the_compiled_folder_says_what_its_checkpoint_says(compiled: Path, tmp_path: Path) -> None:
    convert(compiled, tmp_path / "out", "gptq-v2")
    expected = session(RECIPE, tied=True)(ids())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    program = module.capture(tmp_path / "out")
    assert torch.equal(program(input_ids=ids())["logits"], expected)
