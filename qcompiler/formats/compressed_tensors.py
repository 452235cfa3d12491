"""compressed-tensors checkpoints, as LLM Compressor writes them: integers packed or plain, float8, rounded inputs.

| format | tensors of a layer |
|---|---|
| pack-quantized | `weight_packed` int32 [n, k * bits / 32] (words.py), `weight_shape` int64 [2], `weight_scale` [n, groups], `weight_zero_point` int32 [n * bits / 32, groups] |
| int-, naive-, float-quantized | `weight` int8 or float8_e4m3fn [n, k], `weight_scale`, `weight_zero_point` int8 [n, groups] |
| all | `input_scale`, `input_zero_point` of a layer with a static input; `k_scale`, `v_scale` of an attention |

Integers are signed: code - 2 ** (bits - 1). The configuration says for groups of layers, by name, pattern or class, how
weights and inputs are rounded. Source: compressed-tensors.
"""  # noqa: E501

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.codebooks import float8_map
from qcompiler.errors import InputError, No
from qcompiler.formats.checkpoint import Checkpoint, Format, Rounding, lazily, method_is, open_folder
from qcompiler.formats.compressed_layers import pack, why_not
from qcompiler.formats.folder import SHARD_BYTES, finite, write_folder
from qcompiler.formats.shards import Shards
from qcompiler.formats.words import from_words, word_count
from qcompiler.scheme import QTensor, Scheme
from qcompiler.skeleton import Skeleton

FORMAT_NAMES = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision")
PARTS = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
_ENDLESS = re.compile(r"[*+}?|][^()]*\)[*+{]")  # repetitions of repetitions


def detect(folder: Path) -> bool | No:
    """Whether the folder is a compressed-tensors checkpoint."""
    return method_is(folder, "compressed-tensors")


def read(folder: Path) -> Checkpoint:
    """The checkpoint; every quantized layer is a QTensor. InputError says what is wrong with the folder."""
    config, options, shards = open_folder(folder)
    if options.get("format") not in FORMAT_NAMES:
        raise InputError(f'"{folder}": format {options.get("format")!r} is not read; {", ".join(FORMAT_NAMES)} are')
    groups = _groups(folder, options)
    layers = [name.removesuffix(".weight_scale") for name in shards if name.endswith(".weight_scale")]

    def weight(layer: str) -> QTensor:
        return _unpack(folder, shards, layer, _group_of(folder, groups, layer)["weights"])

    inputs = {}
    for layer in layers:
        how = _group_of(folder, groups, layer).get("input_activations")
        if how is not None:
            inputs[f"{layer}.weight"] = _rounding(
                folder, shards, f"{layer}.input_scale", f"{layer}.input_zero_point", how
            )
    caches = {}
    if how := options.get("kv_cache_scheme"):
        for name in [n for n in shards if n.endswith((".k_scale", ".v_scale"))]:
            caches[name.removesuffix("_scale")] = _rounding(folder, shards, name, name[:-5] + "zero_point", how)
    aside = [n for n in shards if n.rpartition(".")[2] in ("k_scale", "v_scale", "k_zero_point", "v_zero_point")]
    tensors = lazily(shards, layers, PARTS, weight).without(aside)
    return Checkpoint(config, tensors, folder, inputs, caches)


def _groups(folder: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The config_groups, each with targets and weights."""
    found = options.get("config_groups")
    groups = list(found.values()) if isinstance(found, dict) else []
    for group in groups:
        good = isinstance(group, dict) and isinstance(group.get("weights"), dict)
        targets = group.get("targets") if good else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise InputError(f'"{folder}": a group of config_groups has no targets or no weights: {str(group)[:150]}')
    if not groups:
        raise InputError(f'"{folder}": quantization_config has no config_groups')
    return groups


def _group_of(folder: Path, groups: list[dict[str, Any]], layer: str) -> dict[str, Any]:
    """The group that a layer belongs to: that which names it, else whose pattern it fits, else that of its class."""

    def named(target: str) -> bool:
        return target == layer

    def fitting(target: str) -> bool:
        if _ENDLESS.search(target):
            raise InputError(f'"{folder}": the pattern "{target[:80]}" could take forever; write it without nesting')
        try:
            return target.startswith("re:") and re.match(target[3:], layer) is not None
        except (re.error, RecursionError):
            raise InputError(f'"{folder}": "{target[:80]}" is no pattern') from None

    tests: tuple[Callable[[str], bool], ...] = (named, fitting, lambda target: target == "Linear")
    for test in tests:
        for group in groups:
            if any(map(test, group["targets"])):
                return group
    raise InputError(f'"{folder}": no group of config_groups is for the quantized layer "{layer}"')


@dataclass(frozen=True)
class _Args:
    """How a tensor is rounded, checked."""

    bits: int
    kind: str
    strategy: str
    group: int
    symmetric: bool
    dynamic: bool

    @classmethod
    def of(cls, folder: Path, found: Any) -> "_Args":
        found = found if isinstance(found, dict) else {}
        bits, kind, group = found.get("num_bits", 8), found.get("type", "int"), found.get("group_size")
        strategy = found.get("strategy") or ("group" if group else "tensor")
        good = kind in ("int", "float") and strategy in ("tensor", "channel", "group", "token")
        good = good and isinstance(bits, int) and (2 <= bits <= 8 if kind == "int" else bits == 8)
        good = good and (strategy != "group" or (type(group) is int and 0 < group < 2**24))
        if not good or found.get("actorder") in ("group", "dynamic"):
            raise InputError(f'"{folder}": weights or activations of this kind are not read: {str(found)[:150]}')
        group = group if strategy == "group" else 0
        return cls(bits, kind, strategy, group, found.get("symmetric") is not False, bool(found.get("dynamic")))

    def scheme(self) -> Scheme:
        code = "int" if self.kind == "int" else "fp"
        place = f"g{self.group}" if self.group else self.strategy
        text = f"{code}{self.bits}:{place}:{'sym' if self.symmetric else 'asym'}"
        return Scheme.parse(f"{text}:dynamic" if self.dynamic else text)


def _unpack(folder: Path, shards: Shards, layer: str, found: Any) -> QTensor:
    """One layer's weight [n, k]."""
    args = _Args.of(folder, found)
    packed = f"{layer}.weight_packed" in shards
    codes = (_packed if packed else _plain)(folder, shards, layer, args)
    n, k = codes.shape
    groups = -(-k // args.group) if args.group else 1
    wanted = (n if args.strategy in ("channel", "group") else 1, groups)
    scale = shards.get(f"{layer}.weight_scale")
    if args.group and k % args.group:
        raise InputError(f'"{folder}": groups of {args.group} do not divide the {k} columns of "{layer}"')
    if scale.numel() != wanted[0] * wanted[1] or not scale.is_floating_point():
        raise InputError(f'"{folder}": "{layer}.weight_scale" is {list(scale.shape)}, not {list(wanted)}')
    scale = finite(scale, f"{layer}.weight_scale", folder).reshape(wanted)
    scale = scale if scale.dtype == torch.float16 else scale.float()
    zero = None if args.symmetric else _zeros(folder, shards, layer, args, wanted, packed)
    book = float8_map() if args.kind == "float" else None
    return QTensor(args.scheme(), (n, k), pack_bits(codes, args.bits), scale, zero, codebook=book)


def _packed(folder: Path, shards: Shards, layer: str, args: _Args) -> Tensor:
    """The codes in words, uint8 [n, k]."""
    name = f"{layer}.weight_packed"
    shape = shards.get(f"{layer}.weight_shape").flatten().tolist()
    good = len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in shape) and args.kind == "int"
    n, k = shape if good else (0, 0)
    if not good or shards.shape(name) != (n, word_count(k, args.bits)) or shards.dtype(name) != "I32":
        raise InputError(f'"{folder}": "{name}" {shards.shape(name)} does not hold {shape} codes of {args.bits} bits')
    return from_words(shards.get(name), args.bits, k)


def _plain(folder: Path, shards: Shards, layer: str, args: _Args) -> Tensor:
    """The codes one a byte, uint8 [n, k]."""
    name, kind = f"{layer}.weight", "I8" if args.kind == "int" else "F8_E4M3"
    if len(shards.shape(name)) != 2 or shards.dtype(name) != kind or 0 in shards.shape(name):
        raise InputError(f'"{folder}": "{name}" is {shards.dtype(name)} {shards.shape(name)}, not a matrix of {kind}')
    bytes_ = shards.get(name).view(torch.uint8)
    middle = 1 << (args.bits - 1)
    if args.kind == "int":
        codes = (bytes_.view(torch.int8).to(torch.int16) + middle).clamp(-1, 256)
        sound = bool(((codes >= 0) & (codes < 2 * middle)).all())
    else:
        codes, sound = bytes_, bool((bytes_ & 0x7F != 0x7F).all())
    if not sound:
        raise InputError(f'"{folder}": "{name}" holds values that are no {args.bits}-bit codes')
    return codes.to(torch.uint8)


def _zeros(folder: Path, shards: Shards, layer: str, args: _Args, shape: tuple[int, int], packed: bool) -> Tensor:
    """The zero points, uint8 [n, groups]."""
    name = f"{layer}.weight_zero_point"
    stored = shards.get(name)
    if packed and stored.dtype == torch.int32 and args.strategy != "tensor":
        if stored.shape != (word_count(shape[0], args.bits), shape[1]):
            raise InputError(f'"{folder}": "{name}" is {list(stored.shape)}, too few or many words for {list(shape)}')
        return from_words(stored.T.contiguous(), args.bits, shape[0]).T.contiguous()
    zero = stored.to(torch.int16) + (1 << (args.bits - 1)) if not stored.is_floating_point() else stored
    if (
        stored.is_floating_point()
        or zero.numel() != shape[0] * shape[1]
        or not bool(((zero >= 0) & (zero < 1 << args.bits)).all())
    ):
        raise InputError(f'"{folder}": "{name}" holds no zero points of {args.bits} bits for {list(shape)} groups')
    return zero.reshape(shape).to(torch.uint8)


def _rounding(folder: Path, shards: Shards, scale: str, zero: str, found: Any) -> Rounding:
    """How an input or a cache is rounded."""
    args = _Args.of(folder, found)
    scheme = args.scheme()
    if args.dynamic:
        return Rounding(scheme)
    if args.strategy not in ("tensor", "channel"):
        raise InputError(f'"{folder}": static scales of {args.strategy}s are not read: {str(found)[:150]}')
    grid = [finite(shards.get(scale), scale, folder).float().reshape(-1)]
    if not args.symmetric:
        grid.append(shards.get(zero).float().reshape(-1) + (1 << (args.bits - 1)))
    return Rounding(scheme, tuple(grid))


# -- writing -------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that transformers, vLLM and TGI load; InputError for what it cannot hold.

    Layers may differ in their schemes. Scales are stored in the dtype of the checkpoint, float32: readers compute the
    weights in the dtype of their scales.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    extra: dict[str, Tensor] = {}

    def layer(name: str, record: QTensor) -> dict[str, Tensor]:
        rounding = checkpoint.inputs.get(name)
        module = name.removesuffix(".weight")
        groups.setdefault((str(record.scheme), str(rounding.scheme) if rounding else ""), []).append(module)
        return pack(module, record, rounding)

    def options() -> dict[str, Any]:
        if not groups:
            raise InputError("nothing in the model is quantized, and compressed-tensors is for quantized models")
        return _options(checkpoint, groups)

    for name, rounding in checkpoint.caches.items():
        extra[f"{name}_scale"] = rounding.grid[0].float().reshape(1)
    write_folder(checkpoint, folder, layer, options, also=lambda: extra, shard_bytes=shard_bytes)


def _options(checkpoint: Checkpoint, groups: Mapping[tuple[str, str], list[str]]) -> dict[str, Any]:
    """The quantization_config for layers grouped by the schemes of weight and input."""
    linears = Skeleton.of(checkpoint.config, len(checkpoint.tensors)).all_linears
    quantized = {module for modules in groups.values() for module in modules}
    ignored = sorted({name.removesuffix(".weight") for name in linears} - quantized)
    described = {}
    for i, ((weight, given), modules) in enumerate(groups.items()):
        scheme = Scheme.parse(weight)
        described[f"group_{i}"] = {
            "targets": ["Linear"] if len(groups) == 1 else modules,
            "weights": _described(scheme),
            "input_activations": _described(Scheme.parse(given)) if given else None,
            "output_activations": None,
            "format": layout(scheme, bool(given)),
        }
    formats = {group["format"] for group in described.values()}
    caches = next(iter(checkpoint.caches.values()), None)
    return {
        "quant_method": "compressed-tensors",
        "format": str(formats.pop()) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": ignored,
        "kv_cache_scheme": _described(caches.scheme) if caches else None,
    }


def layout(scheme: Scheme, rounded: bool) -> str:
    """The layout that readers expect of a scheme: 8-bit codes are plain where inputs are rounded too."""
    if scheme.code == "fp":
        return "float-quantized"
    return "int-quantized" if rounded and scheme.bits == 8 else "pack-quantized"


def _described(scheme: Scheme) -> dict[str, Any]:
    """A scheme as compressed-tensors' QuantizationArgs."""
    return {
        "num_bits": scheme.bits,
        "type": "float" if scheme.code == "fp" else "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size or None,
        "dynamic": scheme.dynamic,
    }


def _nearest(weight: Tensor, like: Scheme | None) -> QTensor:
    whole = like or Scheme.parse("int4:g64:sym")
    if whole.group_size and weight.shape[-1] % whole.group_size:
        whole = replace(whole, granularity="channel", group_size=0)
    return QTensor.quantize(weight, whole)


FORMATS = (
    Format(
        "compressed-tensors",
        detect,
        read,
        write,
        why_not,
        _nearest,
        False,
        "integers of 2 to 8 bits by groups that divide the rows, channels, tensors; float8; rounded inputs and caches",
    ),
)
