"""Tuned configurations: the fastest is kept for its GPU, found again, and forgotten when the kernel changes."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from typer.testing import CliRunner

import qcompiler
from qcompiler.backends.reference import Reference
from qcompiler.backends.triton import Triton, tuning
from qcompiler.cli import app
from qcompiler.compiler import capture
from qcompiler.errors import No
from qcompiler.kernels import linear_wq, tuned
from qcompiler.kernels.split import Config
from qcompiler.kernels.timing import Launch
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.scheme import Scheme

SCHEME, SHAPE = Scheme.parse("int4:g32:sym"), (160, 512)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for what is measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    linear_wq.config_for.cache_clear()
    return tmp_path / "qcompiler" / "tuned"


@pytest.fixture
def program() -> Program:
    found = capture(torch.nn.Sequential(torch.nn.Linear(512, 160), torch.nn.Linear(160, 512)), (torch.ones(1, 512),))
    Runner(Context(), []).run(found, Recipe.parse("rtn{scheme=int4:g32 include=*}").passes)
    return found


def clock(launches: list[Launch]) -> float:
    """Seconds as if three parts of k and two stages were best."""
    config = launches[0].keywords["config"]  # type: ignore[attr-defined]
    return 1e-6 * (1 + abs(config.split - 3) + abs(config.stages - 2) + config.warps / 8)


def test_the_fastest_is_found_again(program: Program, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    path = tuning.tune(program, torch.device("cpu"), torch.float16, lambda text, done, all: steps.append(done), clock)
    assert path == own_folder / "interpreter.json"
    assert steps == [0, 1, 2]
    entry = json.loads(path.read_text())["entries"]["int4:g32:sym 160x512 M=16"]
    assert entry["config"] == {"tokens": 16, "split": 3, "warps": 4, "stages": 2}
    assert entry["microseconds"] < entry["microseconds_by_rule"]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "interpreter")
    assert linear_wq.config_for(SCHEME, SHAPE, 128, 16, 0) == Config(16, 3, 4, 2)
    rule = linear_wq.configure(*SHAPE, 128, 4, 16)
    assert linear_wq.config_for(SCHEME, SHAPE, 128, 16, -1) == rule != Config(16, 3, 4, 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "another GPU")
    linear_wq.config_for.cache_clear()
    monkeypatch.setattr(linear_wq, "device_at", lambda index: linear_wq.H200)
    assert linear_wq.config_for(SCHEME, SHAPE, 128, 16, 0) == rule


def test_an_entry_of_another_source_counts_for_nothing(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tuned.key_of(SCHEME, SHAPE, 8)
    tuned.save("A GPU", {key: {"config": Config(8, 2)}})
    assert tuned.find("A GPU", key) == Config(8, 2)
    now = tuned.stamp()
    monkeypatch.setattr(tuned, "stamp", lambda: now | {"source": "changed"})
    tuned._table.cache_clear()
    assert tuned.find("A GPU", key) is None
    tuned.save("A GPU", {tuned.key_of(SCHEME, SHAPE, 16): {"config": Config(16, 1)}})
    assert list(json.loads((own_folder / "a-gpu.json").read_text())["entries"]) == ["int4:g32:sym 160x512 M=16"]


def test_what_cannot_be_tuned_says_so(tmp_path: Path, program: Program) -> None:
    answer = Reference().tune(program, lambda *step: None)
    assert isinstance(answer, No)
    assert str(answer) == "the backend reference has nothing to tune"
    qcompiler.compile(
        torch.nn.Linear(32, 8), "rtn{scheme=int4:g32 include=*}", example_inputs=(torch.ones(1, 32),)
    ).save(tmp_path / "out")
    result = CliRunner().invoke(app, ["tune", str(tmp_path / "out"), "--backend", "reference"])
    assert result.exit_code != 0
    assert "has nothing to tune" in str(result.exception) + result.output
    if not torch.cuda.is_available():
        with pytest.raises(qcompiler.errors.BackendError, match="needs an NVIDIA GPU"):
            Triton().tune(program, lambda *step: None)
