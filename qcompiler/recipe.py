"""Recipe: an ordered list of passes with options; the same text in Python, in YAML and on the command line."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qcompiler.errors import RecipeError, nearest
from qcompiler.pipeline import Pass
from qcompiler.plugins import lookup, registry
from qcompiler.scheme import Scheme

_STEP = re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?:,|$)")


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes. `str(recipe)` is its canonical text; `Recipe.parse(str(recipe)) == recipe`.

    >>> recipe = Recipe.parse("canonicalize, rtn{scheme=int4:g128}, pack")
    >>> [step.name for step in recipe.passes]
    ['canonicalize', 'rtn', 'pack']
    """

    passes: tuple[Pass, ...]
    name: str = dataclasses.field(default="", compare=False)

    @classmethod
    def parse(cls, source: "Recipe | str | Path | Sequence[Any] | Mapping[str, Any]") -> "Recipe":
        """Read a recipe: a name, recipe text, a YAML file, a list of passes (or of their texts), or a Recipe.

        Raises RecipeError for unknown names (with the nearest known one) and for options that make no sense.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
            return cls._from_yaml(Path(source))
        if isinstance(source, str):
            named = registry().recipes
            if source in named:
                return dataclasses.replace(cls._from_yaml(named[source]), name=source)
            if re.fullmatch(r"[\w.-]+", source) and source not in registry().passes:
                known = [*named, *registry().passes]
                raise RecipeError(f'there is no recipe or pass "{source}"; {nearest(source, known)}')
            return cls(tuple(_steps(source)))
        if isinstance(source, Sequence):
            return cls(tuple(step for entry in source for step in _entry(entry)))
        raise RecipeError(f"a recipe is a name, a text, a YAML file or a list of passes, not a {type(source).__name__}")

    @classmethod
    def _from_yaml(cls, path: Path) -> "Recipe":
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f'recipe file "{path}" cannot be read: {error}') from error
        if not isinstance(content, dict) or not isinstance(content.get("passes"), list):
            raise RecipeError(f'recipe file "{path}" must be a mapping with a list "passes"')
        return cls.parse(content["passes"])

    def __str__(self) -> str:
        return ", ".join(map(str, self.passes))


def described(name: str) -> str:
    """The one-line description of a named recipe."""
    content = yaml.safe_load(registry().recipes[name].read_text(encoding="utf-8"))
    return str(content.get("about", ""))


def _entry(entry: Any) -> Iterator[Pass]:
    """One entry of a list or YAML file: a Pass, a text, or {name: {option: value}}."""
    if isinstance(entry, Pass):
        yield entry
    elif isinstance(entry, str):
        yield from _steps(entry)
    elif isinstance(entry, Mapping):
        for name, options in entry.items():
            yield build(str(name), options or {})
    else:
        raise RecipeError(f"a recipe entry is a pass, a text or a mapping, not {entry!r}")


def _steps(text: str) -> Iterator[Pass]:
    """The passes of a recipe text."""
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if not match or match.end() == position:
            raise RecipeError(
                f'recipe "{text}" is not understood at "{text[position:].strip()}"; '
                "write for example: canonicalize, gptq{scheme=int4:g128}, pack"
            )
        yield build(match["name"], _options(match["name"], match["options"] or ""))
        position = match.end()


def _options(name: str, text: str) -> dict[str, str]:
    found = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise RecipeError(f'pass "{name}": option "{part}" must be written name=value')
        found[key] = value
    return found


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass `name` with `options` (texts or values); RecipeError names what is unknown or wrong."""
    kind: type[Pass] = lookup("passes", name)
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f'pass "{name}" has no option "{key}"; {nearest(key, known)}')
        values[key] = _coerce(name, key, value, known[key].default)
    return kind(**values)


def _coerce(name: str, key: str, value: Any, default: Any) -> Any:
    """An option's value in the type of its default; None is the default of a scheme that may be left out."""
    try:
        if isinstance(default, Scheme) or default is None:
            return value if isinstance(value, Scheme) else Scheme.parse(str(value))
        if isinstance(default, bool):
            return value if isinstance(value, bool) else _BOOLS[str(value).lower()]
        if isinstance(default, tuple):
            return tuple(value.split("|")) if isinstance(value, str) else tuple(value)
        return type(default)(value)
    except RecipeError as error:
        raise RecipeError(f'pass "{name}": {error}') from None
    except (KeyError, TypeError, ValueError) as error:
        kind = type(default).__name__
        raise RecipeError(f'pass "{name}": option "{key}" must be of type {kind}, not "{value}"') from error


_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
