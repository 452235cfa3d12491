"""The folder that a compilation writes, in other people's programs: onnxruntime-genai, and plain onnxruntime."""

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.backends.onnxruntime import OnnxRuntime
from qcompiler.backends.onnxruntime.names import AT_ONCE
from qcompiler.session import Session
from qcompiler.source import resolve
from tests.programs import tiny_encoder, tiny_folder, tiny_llama
from tests.test_padding import decoder_program

EXAMPLE = Path(__file__).parent.parent / "examples" / "plain_onnxruntime.py"
PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def genai() -> Any:
    """onnxruntime-genai, which `make dev` installs wherever there is a wheel; there it must be."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("onnxruntime-genai has no wheel for this machine")
    return importlib.import_module("onnxruntime_genai")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("travel")
    session = qcompiler.compile(tiny_folder(place / "model"), "rtn-w4a16", backend="onnxruntime")
    session.save(place / "out")
    return place / "out"


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return qcompiler.load(folder)


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """The greedy continuation by onnxruntime-genai."""
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))[len(ids) :]


def test_onnxruntime_genai_runs_the_folder(genai: Any, folder: Path, session: Session) -> None:
    ids = session.tokenizer(PROMPT)["input_ids"]
    expected = session.generate(torch.tensor([ids]), 24)[0, len(ids) :].tolist()
    assert generated(genai.Model(str(folder)), ids, 24) == expected


def test_onnxruntime_genai_reads_a_long_prompt_in_parts(genai: Any, folder: Path, session: Session) -> None:
    assert json.loads((folder / "genai_config.json").read_text())["search"]["chunk_size"] == AT_ONCE
    ids = torch.randint(0, 16, (AT_ONCE + 44,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = session.generate(torch.tensor([ids]), 4)[0, len(ids) :].tolist()
    assert generated(genai.Model(str(folder)), ids, 4) == expected


@pytest.mark.slow
def test_onnxruntime_genai_runs_the_demo_model_with_its_tokenizer(genai: Any, tmp_path: Path) -> None:
    session = qcompiler.compile(resolve("demo").model, "rtn-w4a16", backend="onnxruntime")
    session.save(tmp_path)
    model, prompt = genai.Model(str(tmp_path)), "The capital of France is"
    tokenizer = genai.Tokenizer(model)
    ids = list(map(int, tokenizer.encode(prompt)))
    assert ids == session.tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(generated(model, ids, 16)) == session.generate(prompt, 16)


@pytest.mark.parametrize("options", [{"window": 3}, {"kv_heads": 1}, {"rotary": 8}, {"sinks": True}], ids=str)
def test_onnxruntime_genai_runs_other_decoders(genai: Any, options: dict[str, Any], tmp_path: Path) -> None:
    program = decoder_program(**options)
    runner = OnnxRuntime(accuracy_level=0, threads=1).lower(program, tmp_path)
    assert runner.refusals == ()
    decoder = runner.decoder(1, 32)
    step, expected = torch.tensor([[7, 30, 41]]), []
    for _ in range(12):
        step = decoder.step(step).argmax(-1, keepdim=True)
        expected.append(int(step))
    assert generated(genai.Model(str(tmp_path)), [7, 30, 41], 12) == expected


CODES = "canonicalize, rtn, kv{{key={0}:channel:sym value={0}:channel:sym}}, fuse, kv_cache, pack"


@pytest.mark.parametrize("recipe", ["rtn-w4a16", CODES.format("int8"), CODES.format("int4")])
def test_plain_onnxruntime_runs_the_folder(recipe: str, tmp_path: Path) -> None:
    session = qcompiler.compile(tiny_folder(tmp_path / "model"), recipe, samples=2, length=16, backend="onnxruntime")
    folder = tmp_path / "out"
    session.save(folder)
    command = (sys.executable, str(EXAMPLE), str(folder), PROMPT, "12")
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == session.generate(PROMPT, 12)
    assert "torch" not in EXAMPLE.read_text(encoding="utf-8").split('"""', 2)[2]


def test_programs_that_onnxruntime_genai_cannot_run_say_why(tmp_path: Path) -> None:
    backend = OnnxRuntime(accuracy_level=0, threads=1)
    (no,) = backend.lower(decoder_program(head_dim=12), tmp_path).refusals
    assert "onnxruntime-genai: past and present are not one buffer in every layer" in str(no)
    assert not (tmp_path / "genai_config.json").exists()
    for program in (tiny_llama(), tiny_encoder()):  # no language model with a cache: no promise to keep
        assert backend.lower(program, tmp_path).refusals == ()
