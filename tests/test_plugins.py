"""A stranger's plugin is found, listed and used; a broken one is reported and stops nobody."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcompiler.plugins import registry

CLIP = Path(__file__).parent.parent / "examples" / "plugin_clip"

USE = """
import torch
from torch import nn
import qcompiler
from plugin_clip import Clip
from qcompiler.testing import assert_conforms

torch.manual_seed(0)
weight = torch.distributions.StudentT(2.0).sample((24, 64))
for scheme in ("int3:channel", "int4:g32:asym"):
    scheme = qcompiler.Scheme.parse(scheme)
    clipped, rounded = Clip(scheme).quantize(weight), qcompiler.QTensor.quantize(weight, scheme)
    assert (clipped.dequantize() - weight).norm() < (rounded.dequantize() - weight).norm(), scheme
assert_conforms(Clip)
assert_conforms(Clip, scheme=qcompiler.Scheme.parse("int3:g32:asym"))
session = qcompiler.compile(
    nn.Linear(64, 8), "clip{scheme=int3:channel steps=5}, pack", backend="reference", example_inputs=torch.randn(2, 64)
)
assert session.report.coverage["quantized"] == 1
"""


def python(*arguments: str, path: Path | None = None) -> str:
    """What Python prints; `path` holds installed plugins."""
    extra = {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        (sys.executable, *arguments), text=True, capture_output=True, check=False, env=os.environ | extra
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin, installed by pip from a copy (setuptools leaves files behind where it builds)."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(CLIP, folder / "source")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site"))
    python(*pip, str(folder / "source"))
    return folder / "site"


def test_the_example_is_short() -> None:
    code = (CLIP / "plugin_clip.py").read_text(encoding="utf-8").split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40


def test_the_example_is_listed(installed: Path) -> None:
    listed = python("-m", "qcompiler", "plugins", "--json", path=installed)
    assert "clip" in json.dumps(json.loads(listed)["passes"])


def test_the_example_works_and_conforms(installed: Path) -> None:
    python("-c", USE, path=installed)


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(name, source)`: a plugin of that name, its module holding `source`, as pip would leave it."""

    def add(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        facts = tmp_path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (facts / "entry_points.txt").write_text(f"[qcompiler.plugins]\n{name} = {name}:PLUGIN\n", encoding="utf-8")

    monkeypatch.syspath_prepend(tmp_path)
    registry.cache_clear()
    yield add
    registry.cache_clear()
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


PASS = """
from dataclasses import dataclass
from typing import ClassVar
from qcompiler import Contract, Pass, Plugin

@dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "{name}"
    contract: ClassVar[Contract] = Contract.LOSSY
    def run(self, program, ctx): ...

PLUGIN = Plugin(passes=(Mine,))
"""


def test_a_working_plugin_adds_a_pass(install: Install) -> None:
    install("well_made", PASS.format(name="well_made"))
    assert registry().owners["well_made"] == "well_made"
    assert not registry().broken


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("import sys; sys.exit('no arguments given')", "SystemExit: no arguments given"),
        ("PLUGIN = 3", "int, not a Plugin"),
        ("OTHER = 3", "AttributeError"),
        ("def broken(:", "SyntaxError"),
        ("from qcompiler import Plugin; PLUGIN = Plugin(passes=(3,))", "AttributeError"),
        (PASS.format(name="rtn"), '"rtn" is already taken by plugin "passes"'),
    ],
    ids=["raises", "imports", "exits", "no plugin", "no name", "no python", "no pass", "taken name"],
)
def test_a_broken_plugin_is_reported_and_stops_nobody(install: Install, source: str, reason: str) -> None:
    built_in = registry().passes["rtn"]
    registry.cache_clear()
    install("broken", source)
    install("sound", PASS.format(name="sound"))
    [no] = registry().broken
    assert reason in no.reason
    assert no.where == "plugin broken"
    assert registry().passes["rtn"] is built_in
    assert "sound" in registry().passes
