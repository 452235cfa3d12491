"""The public names: all there, each written down, and free to import."""

import importlib
import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import qcompiler

PROMISED = {
    "Backend",
    "Context",
    "Contract",
    "Decoder",
    "FrontEnd",
    "Kernel",
    "LayerRecord",
    "No",
    "Pass",
    "Plugin",
    "Program",
    "QCompilerError",
    "QTensor",
    "Recipe",
    "Report",
    "Runner",
    "Scheme",
    "Session",
    "Statistic",
    "capture",
    "compile",
    "explain",
    "load",
}


def test_promised_names_are_public() -> None:
    assert set(qcompiler.__all__) >= PROMISED


@pytest.mark.parametrize("name", [name for name in qcompiler.__all__ if not name.startswith("_")])
def test_public_names_are_there_and_say_what_they_are(name: str) -> None:
    value = getattr(qcompiler, name)
    assert not isinstance(value, ModuleType)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__.startswith("qcompiler.")
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}(")  # what @dataclass writes where nobody did
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_names_stay_after_submodules_are_imported() -> None:
    """`qcompiler.compile` is the function, whatever modules are imported before or after."""
    for module in ("compiler", "dynamo", "testing"):
        importlib.import_module(f"qcompiler.{module}")
    assert callable(qcompiler.compile)
    assert callable(qcompiler.load)


def test_dir_lists_the_public_names() -> None:
    assert set(qcompiler.__all__) <= set(dir(qcompiler))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        _ = qcompiler.compil


def test_importing_it_costs_nothing() -> None:
    code = "import sys, qcompiler; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run((sys.executable, "-c", code), text=True, capture_output=True, check=True)
    assert done.stdout == "[]\n"
