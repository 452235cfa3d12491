"""The front door, end to end on a tiny decoder: compile, run, save, load, explain; calibration; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler import data
from qcompiler.compiler import compile, explain, load
from qcompiler.errors import InputError, QCompilerError
from qcompiler.program import Program
from qcompiler.session import Session
from tests.programs import located, tiny_encoder, tiny_llama

RECIPE = "gptq{scheme=int4:g32:asym}, rtn{scheme=int8:g32 include=@head}, fuse, kv_cache, pack"


def model() -> Program:
    """A tiny decoder that knows its vocabulary."""
    program = located(tiny_llama())
    program.info |= {"vocab_size": 80}
    return program


def small(**options: Any) -> Session:
    """A compiled tiny decoder, with little calibration."""
    return compile(model(), options.pop("recipe", RECIPE), samples=4, length=16, **options)


def test_the_same_artifact_says_the_same_on_both_backends(tmp_path: Path) -> None:
    session = small(backend="onnxruntime")
    prompt = torch.tensor([[5, 7, 11]])
    said = session.generate(prompt, max_new_tokens=12)
    assert said.shape == (1, 15)
    session.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(again(prompt), session(prompt))
    assert torch.equal(again.generate(prompt, max_new_tokens=12), said)
    reference = load(tmp_path / "out", backend="reference")
    difference = (reference(prompt) - session(prompt)).abs().max() / reference(prompt).abs().max()
    assert difference < 0.05  # the default computes matmuls in 8 bits
    assert again.report.to_json() == session.report.to_json()


def test_report_says_what_was_done() -> None:
    report = small(backend="reference").report
    assert report.coverage["quantized"] == report.coverage["linears"] == 9
    assert report.coverage["bytes_share"] > 0.99
    assert report.sizes_mb["compiled"] < report.sizes_mb["float"] / 3
    assert [record.name for record in report.passes] == ["gptq", "rtn", "fuse", "kv_cache", "pack"]
    assert "9 of 9 linear layers" in str(report)
    assert report.calibration == "self, 4 x 16 tokens, seed 0"


def test_sampling_is_seeded_and_leaves_the_global_generator_alone() -> None:
    session = small(recipe="rtn{scheme=int8:g32}, kv_cache", backend="reference")
    before = torch.get_rng_state()
    a, b, c = (session.generate(torch.tensor([[1]]), 20, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_ends_at_the_end_token() -> None:
    program = model()
    session = compile(program, "kv_cache", backend="reference")
    first = session.generate(torch.tensor([[1, 2]]), 1)[0, -1].item()
    session.program.info["eos"] = [first]
    assert session.generate(torch.tensor([[1, 2]]), 20).shape == (1, 3)


def test_explain_does_nothing_to_the_model() -> None:
    program = model()
    before = program.fingerprint()
    report = explain(program, RECIPE)
    assert report.coverage["quantized"] == 9
    assert report.backend == "onnxruntime"
    assert program.fingerprint() == before


def test_strict_turns_refusals_into_an_error() -> None:
    encoder = tiny_encoder()
    assert "cannot continue from a cache" in compile(encoder, "kv_cache", backend="reference").report.all_refusals[0]
    with pytest.raises(QCompilerError, match=r"strict: 1 refusals, the first: kv_cache: "):
        compile(encoder, "kv_cache", backend="reference", strict=True)


def test_what_cannot_be_compiled_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'"no/such" does not exist; give a model folder'):
        qcompiler.capture("no/such")
    with pytest.raises(InputError, match="no front end takes int"):
        qcompiler.capture(5)
    with pytest.raises(QCompilerError, match='no backend "onxruntime"; did you mean "onnxruntime"'):
        compile(model(), "rtn", backend="onxruntime")


class Tokenizer:
    """Letters as ids."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 80 for letter in text]}


def test_calibration_sources(tmp_path: Path) -> None:
    program = model()
    text = tmp_path / "text.txt"
    text.write_text("many words " * 40)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join([json.dumps({"text": "some words " * 10}), json.dumps({"input_ids": [1, 2, 3] * 20})]))
    rows = (torch.arange(120) % 80).view(2, 60)
    for source in (text, str(lines), ["words " * 40], [torch.arange(60)], rows.unbind()):
        wanted = data.Calibration(source, 3, 20)
        batches = data.load(wanted, program, Tokenizer())
        assert sum(batch["input_ids"].shape[0] for batch in batches) <= 3
    written = data.load(data.Calibration("self", 3, 12, seed=1), program)
    again = data.load(data.Calibration("self", 3, 12, seed=1), program)
    assert torch.equal(written[0]["input_ids"], again[0]["input_ids"])
    assert written[0]["input_ids"].shape == (3, 12)


def test_bad_calibration_is_said(tmp_path: Path) -> None:
    program = model()
    empty, binary, bad = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "bad.jsonl"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    bad.write_text('{"text": "fine"}\nnot json\n')
    for source, message in (
        (empty, "is empty"),
        (binary, "is not UTF-8 text"),
        (bad, 'line 2: no JSON object with "text" or "input_ids"'),
        (tmp_path / "gone.txt", "does not exist"),
        ([], "calibration data is empty"),
        (["short"], "fewer than one window of 20"),
        ([torch.full((1, 20), 10**6)], r"holds token 1000000 and the model knows \d+ tokens"),
    ):
        with pytest.raises(InputError, match=message):
            data.load(data.Calibration(source, 3, 20), program, Tokenizer())
    with pytest.raises(InputError, match="texts need a tokenizer"):
        data.load(data.Calibration(["words " * 9], 3, 20), program)
    with pytest.raises(InputError, match="at least 1 sample of 2 tokens"):
        data.Calibration("self", 0, 1)
    with pytest.raises(InputError, match="only a language model can write its own calibration data"):
        data.load(data.Calibration("self", 3, 20), tiny_encoder())
