"""What all tests share: one thread to a worker, no network, and texts to compare with."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
BLESS = os.environ.get("QCOMPILER_BLESS") == "1"

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ["TRITON_INTERPRET"] = "1"  # likewise before triton: kernels run without a GPU, see interpreter.py


def pytest_configure(config: pytest.Config) -> None:
    """Give each xdist worker one thread: together they would otherwise fight over the cores."""
    config.addinivalue_line("markers", "golden: compares a text with tests/golden (set by itself)")
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """No doctests in files of tests: one that cannot be imported would be skipped for theirs, and its tests with it."""
    found = yield
    return [collector for collector in found if type(collector).__name__ != "DoctestModule"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use `golden`, so that `make bless` runs those alone."""
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """`golden(name, text)`: the text must be that of tests/golden/<name>.txt; `make bless` rewrites it."""
    return compare_golden


def compare_golden(name: str, text: str) -> None:
    """Compare a text with its golden file, or write the file when blessing."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name:
        raise ValueError(f"golden({name!r}): a name is words joined by - . _ and /")
    path = GOLDEN / f"{name}.txt"
    shown = path.relative_to(GOLDEN.parent.parent).as_posix()
    text = text.rstrip("\n") + "\n"
    if BLESS:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    if not path.exists():
        pytest.fail(f"{shown} does not exist; `make bless` writes it. The text is now:\n{text}", pytrace=False)
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), shown, "now", lineterm="")
        changes = "\n".join(diff) or "(only the ends of lines differ)"
        pytest.fail(f"{shown} differs; if the change is meant, `make bless`.\n{changes}", pytrace=False)
