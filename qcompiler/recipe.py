"""Recipe: an ordered list of passes with options; the same text in Python, in YAML and on the command line."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from qcompiler.errors import RecipeError, nearest
from qcompiler.pipeline import Pass
from qcompiler.plugins import lookup, registry
from qcompiler.scheme import Scheme
from qcompiler.target import Backend

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
        yield build(match["name"], _options(f'pass "{match["name"]}"', match["options"] or ""))
        position = match.end()


def _options(owner: str, text: str) -> dict[str, str]:
    found = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise RecipeError(f'{owner}: option "{part}" must be written name=value')
        found[key] = value
    return found


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass `name` with `options` (texts or values); RecipeError names what is unknown or wrong."""
    kind: type[Pass] = lookup("passes", name)
    return kind(**_values(f'pass "{name}"', kind, options))


def build_backend(text: str) -> Backend:
    """The backend that a text names, perhaps with options; RecipeError names what is unknown or wrong.

    >>> build_backend("onnxruntime{threads=1 integer_prompt=true}").integer_prompt
    True
    """
    match = _STEP.fullmatch(text)
    if not match:
        raise RecipeError(f'backend "{text}" is not understood; write for example: onnxruntime{{threads=2}}')
    kind: type[Backend] = lookup("backends", match["name"])
    owner = f'backend "{match["name"]}"'
    return kind(**_values(owner, kind, _options(owner, match["options"] or "")))


def _values(owner: str, kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the types of a dataclass's fields."""
    known = {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    values = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f'{owner} has no option "{key}"; {nearest(key, known)}')
        values[key] = _coerce(owner, known[key], value)
    return values


def _coerce(owner: str, field: "dataclasses.Field[Any]", value: Any) -> Any:
    """An option's value in the type of its default; where that is None, the option is a whole number or a scheme."""
    key, default = field.name, field.default
    try:
        if default is None and int in get_args(field.type):
            return int(value)
        if isinstance(default, Scheme) or default is None:
            return value if isinstance(value, Scheme) else Scheme.parse(str(value))
        if isinstance(default, bool):
            return value if isinstance(value, bool) else _BOOLS[str(value).lower()]
        if isinstance(default, tuple):
            return tuple(value.split("|")) if isinstance(value, str) else tuple(value)
        made: Any = type(default)
        return made(value)
    except RecipeError as error:
        raise RecipeError(f"{owner}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        kind = "int" if default is None else type(default).__name__
        raise RecipeError(f'{owner}: option "{key}" must be of type {kind}, not "{value}"') from error


_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
