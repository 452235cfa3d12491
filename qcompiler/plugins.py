"""Plugin, and where plugins are found: one entry-point group, which the built-in ones use too."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, No, RecipeError, nearest
from qcompiler.formats.checkpoint import Format
from qcompiler.pipeline import Pass
from qcompiler.target import Backend, Kernel

GROUP = "qcompiler.plugins"


@dataclass(frozen=True)
class FrontEnd:
    """A way to turn a model into a Program.

    `accepts(source)` is True or a No; `capture(source, example_inputs)` returns the Program; `tokenizer(place)` reads
    the tokenizer from what the program's `info["tokenizer"]` says.
    """

    name: str
    accepts: Callable[[Any], bool | No]
    capture: Callable[[Any, Any], Any]
    tokenizer: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Plugin:
    """What a package adds to qcompiler: a value found through the entry-point group `qcompiler.plugins`.

    `recipes` is a folder of YAML files, one named recipe each.
    """

    passes: tuple[type[Pass], ...] = ()
    backends: tuple[type[Backend], ...] = ()
    kernels: tuple[Kernel, ...] = ()
    frontends: tuple[FrontEnd, ...] = ()
    formats: tuple[Format, ...] = ()
    recipes: Path | None = None


@dataclass
class Registry:
    """Everything the plugins list, by name, and the plugins that could not be used, with the reason."""

    passes: dict[str, type[Pass]] = field(default_factory=dict)
    backends: dict[str, type[Backend]] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    frontends: dict[str, FrontEnd] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)
    recipes: dict[str, Path] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    broken: list[No] = field(default_factory=list)

    def add(self, owner: str, plugin: Plugin) -> None:
        """Take over what `plugin` lists; RecipeError if a name is already taken, naming both owners."""
        recipes = sorted(plugin.recipes.glob("*.yaml")) if plugin.recipes else []
        named: list[tuple[dict[str, Any], str, Any]] = [
            *((self.passes, p.name, p) for p in plugin.passes),
            *((self.backends, b.name, b) for b in plugin.backends),
            *((self.kernels, k.name, k) for k in plugin.kernels),
            *((self.frontends, f.name, f) for f in plugin.frontends),
            *((self.formats, f.name, f) for f in plugin.formats),
            *((self.recipes, path.stem, path) for path in recipes),
        ]
        seen: set[tuple[int, str]] = set()
        for table, name, _ in named:
            if name in table or (id(table), name) in seen:
                other = self.owners.get(name, owner)
                raise RecipeError(f'"{name}" is already taken by plugin "{other}"; plugin "{owner}" must rename it')
            seen.add((id(table), name))
        for table, name, value in named:
            table[name] = value
            self.owners[name] = owner


def _builtin_first(entry: EntryPoint) -> tuple[bool, str]:
    return (not entry.value.startswith("qcompiler."), entry.name)


@functools.cache
def registry() -> Registry:
    """All installed plugins; a broken one is reported in `broken` and otherwise ignored."""
    found = Registry()
    for entry in sorted(entry_points(group=GROUP), key=_builtin_first):
        try:
            plugin = entry.load()
            if not isinstance(plugin, Plugin):
                raise TypeError(f"{entry.value} is of type {type(plugin).__name__}, not a Plugin")
            found.add(entry.name, plugin)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a stranger's code must not stop the others
            found.broken.append(No(f"{type(error).__name__}: {error}", where=f"plugin {entry.name}"))
    if not found.passes and not found.backends:
        raise InputError("qcompiler is not installed properly: no plugins found; run: pip install -e .")
    return found


def lookup(kind: str, name: str) -> Any:
    """The pass, backend, front end or format called `name`; RecipeError with the nearest name if there is none."""
    table: Mapping[str, Any] = getattr(registry(), kind)
    if name not in table:
        noun = {"passes": "pass", "backends": "backend", "frontends": "front end", "formats": "format"}
        broken = "".join(f"; not loaded: {no}" for no in registry().broken)
        raise RecipeError(f'there is no {noun.get(kind, kind)} "{name}"; {nearest(name, table)}{broken}')
    return table[name]
