"""Checkpoint: a model as its configuration and its tensors; Format: how such a thing is stored, read and written."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qcompiler.errors import InputError, No
from qcompiler.formats.shards import Shards, read_json
from qcompiler.scheme import QTensor, Scheme

Value = Tensor | QTensor


class Lazy(Mapping[str, Value]):
    """Tensors by name, each made by its function whenever it is asked for; nothing is kept.

    >>> import torch
    >>> lazy = Lazy({"w": lambda: torch.ones(2)})
    >>> list(lazy), lazy["w"]
    (['w'], tensor([1., 1.]))
    """

    def __init__(self, makers: Mapping[str, Callable[[], Value]]) -> None:
        self._makers = dict(makers)

    def without(self, names: Iterable[str]) -> "Lazy":
        """The same less some."""
        out = set(names)
        return Lazy({name: make for name, make in self._makers.items() if name not in out})

    def __getitem__(self, name: str) -> Value:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Rounding:
    """How a layer's input, or a cache, is rounded: its scheme, and the grid of a static one (scale, and zero point)."""

    scheme: Scheme
    grid: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A model: `config` as transformers writes it (without its quantization_config), and tensors by their names there.

    `tensors` is read lazily, one tensor at a time. `inputs` says how the inputs of layers are rounded, by the name of
    the layer's weight; `caches` how keys and values are, by the name of the attention module. `source` is a folder
    with the files that go with the model (tokenizer, generation settings).
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Value]
    source: Path | None = None
    inputs: Mapping[str, Rounding] = field(default_factory=dict)
    caches: Mapping[str, Rounding] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    `detect(path)` is True or a No. `read(path)` gives a Checkpoint, `write(checkpoint, folder)` stores one; what
    cannot be stored without loss raises InputError there, and `holds(record)` says so for one quantized weight
    beforehand. `nearest(weight, like)` quantizes floats as the format can hold them, by the scheme `like` if it is
    given. `uniform` formats have one number of bits and one group size for all layers. `conditions` says in words what
    the format holds. A format whose clients build the graph themselves, by an architecture's name, has instead
    `write_program(program, path)`, which gives the kind of each tensor it wrote, and `compare(program, path)`, which
    raises InputError where a value is not what it was.
    """

    name: str
    detect: Callable[[Path], bool | No]
    read: Callable[..., Any] | None = None
    write: Callable[..., Any] | None = None
    holds: Callable[[QTensor], bool | No] | None = None
    nearest: Callable[[Tensor, Scheme | None], QTensor] | None = None
    uniform: bool = False
    conditions: str = ""
    write_program: Callable[..., Mapping[str, str]] | None = None
    compare: Callable[..., None] | None = None


def by_rounding(default: str) -> Callable[[Tensor, Scheme | None], QTensor]:
    """A `nearest` that rounds to the grid of a scheme, by default this one."""
    return lambda weight, like: QTensor.quantize(weight, like or Scheme.parse(default))


def quantization_of(folder: Path) -> dict[str, Any] | No:
    """The quantization_config of a checkpoint: that in config.json, or the file quantize_config.json of older tools."""
    if not (folder / "config.json").is_file():
        return No(f'"{folder}" is not a folder with a config.json')
    config = read_json(folder / "config.json")
    found = config.get("quantization_config", config.get("compression_config"))
    if found is None and (folder / "quantize_config.json").is_file():
        found = {"quant_method": "gptq"} | read_json(folder / "quantize_config.json")
    if found is None:
        return No("its config.json names no quantization_config")
    if not isinstance(found, dict):
        raise InputError(f'"{folder}": quantization_config is a {type(found).__name__}, not an object')
    return found


def method_is(folder: Path, *names: str) -> bool | No:
    """Whether the checkpoint says that it was quantized by one of these methods."""
    found = quantization_of(folder)
    if isinstance(found, No):
        return found
    method = found.get("quant_method")
    return method in names or No(f"its quant_method is {method!r}")


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Shards]:
    """The configuration without its quantization_config, that by itself, and the tensors."""
    found = quantization_of(folder)
    config = read_json(folder / "config.json") if not isinstance(found, No) else {}
    if isinstance(found, No):
        raise InputError(f'"{folder}": {found}')
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    return config, found, Shards(folder)


def lazily(shards: Shards, layers: Iterable[str], parts: Collection[str], unpack: Callable[[str], QTensor]) -> Lazy:
    """All tensors of a folder; in the place of the `parts` of each layer its weight, which `unpack(layer)` makes."""
    quantized = sorted(layers)
    packed = {f"{layer}.{part}" for layer in quantized for part in parts}
    makers: dict[str, Callable[[], Value]] = {n: partial(shards.get, n) for n in shards if n not in packed}
    return Lazy(makers | {f"{layer}.weight": partial(unpack, layer) for layer in quantized})


def integer(options: Mapping[str, Any], key: str, allowed: Sequence[int] | range, where: Path) -> int:
    """An option that must be one of some whole numbers; InputError names what was found."""
    value = options.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        shown = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else " or ".join(map(str, allowed))
        raise InputError(f'"{where}": {key} is {value!r}; it must be {shown}')
    return value
