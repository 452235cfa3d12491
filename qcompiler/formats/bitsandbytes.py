"""bitsandbytes checkpoints: NF4 and FP4 over blocks, with and without double quantization, and 8-bit integers.

| tensor of a layer | holds |
|---|---|
| `weight` | uint8 [ceil(n k / 2), 1], two codes a byte, the first in the high half; or int8 [n, k] |
| `weight.absmax` | float32 [blocks], or uint8 [blocks] where it is quantized too |
| `weight.quant_map` | float32 [16], the codebook |
| `weight.nested_absmax`, `.nested_quant_map` | float32 [runs of 256 blocks], float32 [256] |
| `weight.quant_state.bitsandbytes__nf4` (or fp4) | uint8, the bytes of a JSON object: sizes, dtype, offset |
| `SCB`, `weight_format` | of 8-bit weights: float32 [n], the largest magnitudes of the rows; uint8, 0: stored by row |

Blocks run over the flattened weight. Sources: bitsandbytes, transformers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.codebooks import BLOCKS, NESTED, codebook, nested_record, quantize_blocks
from qcompiler.errors import InputError, No
from qcompiler.formats.checkpoint import Checkpoint, Format, lazily, method_is, open_folder
from qcompiler.formats.folder import SHARD_BYTES, Uniform, finite, refuse_roundings, write_folder
from qcompiler.formats.shards import Shards
from qcompiler.scheme import QTensor, Scheme

KINDS = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
PARTS = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(f"{STATE}{kind}" for kind in KINDS),
    *("SCB", "weight_format"),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEVENTH = 7.874015718698502e-3  # bitsandbytes' 1 / 127


def detect(folder: Path) -> bool | No:
    """Whether the folder is a bitsandbytes checkpoint."""
    return method_is(folder, "bitsandbytes")


def read(folder: Path) -> Checkpoint:
    """The checkpoint; every quantized layer is a QTensor. InputError says what is wrong with the folder."""
    config, _, shards = open_folder(folder)
    states = {n.partition(f".{STATE}")[0]: n for n in shards if f".{STATE}" in n}
    whole = {n.removesuffix(".SCB") for n in shards if n.endswith(".SCB")}

    def weight(layer: str) -> QTensor:
        return _unpack_8bit(folder, shards, layer) if layer in whole else _unpack(folder, shards, layer, states[layer])

    return Checkpoint(config, lazily(shards, whole | states.keys(), PARTS, weight), folder)


def _unpack(folder: Path, shards: Shards, layer: str, state: str) -> QTensor:
    """A weight in 4 bits."""
    kind, n, k, block, dtype, facts = _state(folder, shards, state)
    count = n * k
    blocks = -(-count // block)
    name = f"{layer}.weight"
    stored = shards.get(name)
    table = shards.get(f"{name}.quant_map")
    absmax = shards.get(f"{name}.absmax")
    double = "nested_blocksize" in facts
    fits = stored.nbytes == -(-count // 2) and absmax.numel() == blocks
    if not fits or table.shape != (16,) or absmax.dtype != (torch.uint8 if double else torch.float32):
        raise InputError(f'"{folder}": the tensors of "{name}" do not fit its {n} x {k} values in blocks of {block}')
    by_row = k % block == 0
    places = (n, k // block) if by_row else (1, blocks)
    scale: Tensor | QTensor = finite(absmax, f"{name}.absmax", folder).view(places)
    if double:
        scale = _unpack_nested(folder, shards, name, absmax.view(-1), places, facts)
    halves = stored.reshape(-1).view(torch.uint8)
    codes = ((halves >> 4) | (halves << 4)).view(places[0], -1)
    finite(table, f"{name}.quant_map", folder)
    scheme = Scheme.parse(f"{kind}:g{block}")
    axis = -1 if by_row else None
    return QTensor(scheme, (n, k), codes, scale, codebook=table.float(), dtype=dtype, axis=axis)


def _state(folder: Path, shards: Shards, name: str) -> tuple[str, int, int, int, torch.dtype, dict[str, Any]]:
    """Kind, sizes n and k, block, dtype, and all else that the JSON beside a weight says."""
    kind = name.rpartition("__")[2]
    data = shards.get(name)
    try:
        facts = json.loads(bytes(data.numpy())) if data.dtype == torch.uint8 and data.numel() < 2**16 else None
    except (ValueError, RecursionError):
        facts = None
    facts = facts if isinstance(facts, dict) else {}
    shape, block = facts.get("shape"), facts.get("blocksize")
    good = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 2**31 for size in shape)
    if not good or block not in BLOCKS or facts.get("dtype") not in DTYPES or kind not in KINDS:
        raise InputError(f'"{folder}": "{name}" is not the state of a quantized matrix: {str(facts)[:150]}')
    assert isinstance(shape, list)
    return kind, shape[0], shape[1], int(block), DTYPES[facts["dtype"]], facts


def _unpack_nested(
    folder: Path, shards: Shards, name: str, codes: Tensor, shape: tuple[int, int], facts: dict[str, Any]
) -> QTensor:
    """Scales that are quantized themselves."""
    scale, table = shards.get(f"{name}.nested_absmax"), shards.get(f"{name}.nested_quant_map")
    offset = facts.get("nested_offset")
    fits = scale.shape == (-(-codes.numel() // NESTED),) and table.shape == (256,)
    types = scale.dtype == table.dtype == torch.float32
    if not fits or not types or facts["nested_blocksize"] != NESTED or not isinstance(offset, float):
        raise InputError(f'"{folder}": the scales of "{name}" do not fit together: {str(facts)[:150]}')
    place = torch.tensor(offset)
    for part, values in (("nested_absmax", scale), ("nested_quant_map", table), ("nested_offset", place)):
        finite(values, f"{name}.{part}", folder)
    return nested_record(shape, codes, scale, table, place)


def _unpack_8bit(folder: Path, shards: Shards, layer: str) -> QTensor:
    """A weight in 8 bits."""
    shape, peaks = shards.shape(f"{layer}.weight"), shards.get(f"{layer}.SCB")
    layout = int(shards.get(f"{layer}.weight_format").flatten()[0]) if f"{layer}.weight_format" in shards else 0
    fits = len(shape) == 2 and peaks.shape == shape[:1] and shards.dtype(f"{layer}.weight") == "I8"
    if not fits or peaks.dtype != torch.float32 or layout:
        raise InputError(f'"{folder}": "{layer}.weight" is not an 8-bit weight by rows: {shape}, layout {layout}')
    codes = shards.get(f"{layer}.weight").view(torch.uint8) ^ 128
    scale = finite(peaks, f"{layer}.SCB", folder)[:, None] * SEVENTH
    return QTensor(Scheme.parse("int8:channel:sym"), (shape[0], shape[1]), codes, scale)


def holds(record: QTensor) -> bool | No:
    """Whether the format stores this weight exactly."""
    if len(record.shape) != 2:
        return No(f"it has {len(record.shape)} axes, not 2")
    if any(part is not None for part in (record.zero, record.minimum, record.boundaries, record.permutation)):
        return No("it has zero points, minima or an order of its own")
    if record.codebook is None:
        return _holds_8bit(record)
    kind = f"{record.scheme.code}{record.scheme.bits}"
    if kind not in KINDS or not torch.equal(record.codebook, codebook(kind)):
        return No(f"its codebook ({kind}) is not bitsandbytes'")
    if record.scheme.group_size not in BLOCKS:
        return No(f"blocks of {record.scheme.group_of(record.columns)}, not 32 to 4096")
    if record.axis is not None and record.columns % record.scheme.group_size:
        return No("its blocks end with its rows")
    nested = record.scale
    if isinstance(nested, QTensor) and (nested.scheme.group_size != NESTED or nested.axis is not None):
        return No("its scales are quantized in another way")
    return True


def _holds_8bit(record: QTensor) -> bool | No:
    if str(record.scheme) != "int8:channel:sym" or record.axis not in (-1, 1) or isinstance(record.scale, QTensor):
        return No(f"its codes are {record.scheme}; 8-bit weights have one scale a row, int8:channel:sym")
    return torch.equal(_peaks(record) * SEVENTH, record.scale.float()) or No("its scales are no whole float32 / 127")


def _peaks(record: QTensor) -> Tensor:
    """The float32 numbers [n, 1] that give the scales when bitsandbytes divides them by 127, where there are any."""
    assert isinstance(record.scale, Tensor)
    scale = record.scale.float()
    found = scale * 127
    for target in (torch.inf, -torch.inf):
        near = torch.nextafter(scale * 127, torch.tensor(target))
        found = torch.where(near * SEVENTH == scale, near, found)
    return found


def pack(layer: str, record: QTensor) -> dict[str, Tensor]:
    """The tensors of a layer; InputError if the format cannot hold it."""
    answer, name = holds(record), f"{layer}.weight"
    if isinstance(answer, No):
        raise InputError(f'"{name}" cannot be stored as bitsandbytes: {answer}')
    if record.codebook is None:
        codes = (record.codes ^ 128).view(torch.int8)
        form = torch.tensor(0, dtype=torch.uint8)
        return {name: codes, f"{layer}.SCB": _peaks(record).flatten(), f"{layer}.weight_format": form}
    kind = f"{record.scheme.code}{record.scheme.bits}"
    facts: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": record.scheme.group_size,
        "dtype": str(record.dtype).removeprefix("torch."),
        "shape": list(record.shape),
    }
    flat = record.codes.reshape(-1)
    parts = {
        name: ((flat >> 4) | (flat << 4))[:, None],
        f"{name}.quant_map": record.codebook,
    }
    scale = record.scale
    if isinstance(scale, QTensor):
        assert isinstance(scale.scale, Tensor)
        assert isinstance(scale.minimum, Tensor)
        assert scale.codebook is not None
        facts |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": scale.minimum.item()}
        nested = {"absmax": scale.codes, "nested_absmax": scale.scale, "nested_quant_map": scale.codebook}
        parts |= {f"{name}.{part}": tensor.flatten() for part, tensor in nested.items()}
    else:
        parts[f"{name}.absmax"] = scale.float().flatten()
    text = json.dumps(facts).encode()
    return parts | {f"{layer}.{STATE}{kind}": torch.tensor(list(text), dtype=torch.uint8)}


def write(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that transformers loads with bitsandbytes; InputError for what it cannot hold."""
    same = Uniform("a bitsandbytes checkpoint")
    refuse_roundings(checkpoint, "a bitsandbytes checkpoint")
    doubled: set[bool] = set()

    def layer(name: str, record: QTensor) -> dict[str, Tensor]:
        same.see(name, record)
        doubled.add(isinstance(record.scale, QTensor))
        return pack(name.removesuffix(".weight"), record)

    def options() -> dict[str, Any]:
        scheme = same.known
        four = scheme.bits == 4
        kind = f"{scheme.code}{scheme.bits}" if four else "nf4"
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": True in doubled,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": same.left_out(checkpoint),
        }

    write_folder(checkpoint, folder, layer, options, shard_bytes=shard_bytes)


FORMATS = (
    Format(
        "bitsandbytes",
        detect,
        read,
        write,
        holds,
        lambda weight, like: quantize_blocks(weight, "nf4", 64),
        True,
        "nf4 or fp4 in blocks of 32 to 4096 of the flattened weight, scales plain or quantized; int8 by row",
    ),
)
