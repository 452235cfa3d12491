"""Scheme: how numbers are stored. QTensor: one record of a quantized tensor, in one canonical layout."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.bits import pack_bits, unpack_bits
from qcompiler.errors import InputError, RecipeError

GRANULARITIES = ("tensor", "channel", "token", "group")
_CODE = re.compile(r"(?P<code>int|nf|fp)(?P<bits>\d+)")


@dataclass(frozen=True)
class Scheme:
    """How numbers are stored: bits, code type, granularity, symmetric or not, static or dynamic.

    The text form is the same everywhere; `Scheme.parse(str(s)) == s`. `sym` is the default.

    >>> scheme = Scheme.parse("int4:g128")
    >>> str(scheme), scheme.bits, scheme.group_size, scheme.symmetric
    ('int4:g128:sym', 4, 128, True)
    >>> str(Scheme.parse("int8:token:asym:dynamic"))
    'int8:token:asym:dynamic'
    """

    bits: int
    code: str = "int"
    granularity: str = "channel"
    group_size: int = 0
    symmetric: bool = True
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"a scheme has 2 to 8 bits, not {self.bits}; write for example int4:g128:sym")
        if self.granularity not in GRANULARITIES:
            raise RecipeError(f'granularity "{self.granularity}" is none of {", ".join(GRANULARITIES)}')
        if (self.granularity == "group") != (self.group_size > 0):
            raise RecipeError(
                f"a group size of {self.group_size} makes no sense; write a positive one, for example int4:g128"
            )

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read a scheme such as `int4:g128:asym`; RecipeError says which part is wrong.

        >>> Scheme.parse("int4:g0")
        Traceback (most recent call last):
        ...
        qcompiler.errors.RecipeError: scheme "int4:g0": a group size of 0 makes no sense; \
write a positive one, for example int4:g128
        """
        head, *parts = text.strip().split(":")
        match = _CODE.fullmatch(head)
        if not match:
            raise RecipeError(f'scheme "{text}": "{head}" is no code type; write for example int4, int8 or nf4')
        options: dict[str, Any] = {"code": match["code"], "bits": int(match["bits"])}
        for part in parts:
            if re.fullmatch(r"g-?\d+", part):
                options |= {"granularity": "group", "group_size": int(part[1:])}
            elif part in GRANULARITIES[:3]:
                options["granularity"] = part
            elif part in ("sym", "asym"):
                options["symmetric"] = part == "sym"
            elif part in ("static", "dynamic"):
                options["dynamic"] = part == "dynamic"
            else:
                raise RecipeError(
                    f'scheme "{text}": "{part}" is not understood; parts are g<size>, tensor, channel, token, '
                    "sym, asym, dynamic"
                )
        try:
            return cls(**options)
        except RecipeError as error:
            raise RecipeError(f'scheme "{text}": {error}') from None

    def __str__(self) -> str:
        granularity = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        text = f"{self.code}{self.bits}:{granularity}:{'sym' if self.symmetric else 'asym'}"
        return f"{text}:dynamic" if self.dynamic else text

    @property
    def levels(self) -> int:
        """Number of codes, 2 ** bits."""
        return 1 << self.bits

    def group_of(self, columns: int) -> int:
        """Columns that share one scale in a row of `columns`; the last group may be shorter."""
        return min(self.group_size, columns) if self.granularity == "group" else columns

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns`.

        >>> Scheme.parse("int4:g128").groups(576)
        5
        """
        return -(-columns // self.group_of(columns)) if columns else 0


def storage_dtype(scale: Tensor) -> torch.dtype:
    """float16 where every scale fits its normal range, as checkpoints store them; float32 otherwise."""
    magnitude = scale.abs()
    normal = (magnitude == 0) | ((magnitude >= 6.2e-5) & (magnitude <= 65504))
    return torch.float16 if bool(normal.all()) else torch.float32


def range_grid(
    low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None if symmetric) of the integer grid that covers [low, high].

    The range is widened to hold zero. Symmetric: the range is +-absmax, the zero code is 2**(bits-1).
    The scale is already rounded to the dtype it will be stored in (`dtype`, or what `storage_dtype` says), so that
    codes fit the stored grid. Raises RecipeError for a code type whose values are not evenly spaced.
    """
    if scheme.code != "int":
        raise RecipeError(
            f'scheme "{scheme}": only int codes can be computed from a range; write for example int4:g128'
        )
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (scheme.levels - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = scale.to(dtype or storage_dtype(scale))
    if scheme.symmetric:
        return scale, None
    return scale, torch.round(-low / scale.float()).clamp(0, scheme.levels - 1).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor in the canonical layout; `dequantize()` is its definition.

    The group axis is moved last and the tensor seen as a matrix of rows and columns; axis None flattens it to one row,
    so that groups run across rows (bitsandbytes). Then
    `value = scale * (code - zero)`, or `scale * code + minimum`, or `scale * codebook[code]`, plus the minimum if there
    is one (the offset of bitsandbytes' quantized scales).

    - `codes`: uint8 [rows, ceil(columns * bits / 8)], one bit stream per row (`pack_bits`)
    - `scale`: float16/32 [rows, groups] ([1, 1] per tensor, [rows, 1] per channel), or itself a QTensor
    - `zero`: uint8, like `scale`; without it (and without minimum or codebook) zero is `2 ** (bits - 1)`
    - `minimum`: float, like `scale`, or itself a QTensor
    - `codebook`: float32 [2 ** bits]
    - `boundaries`: int32 [groups + 1], column offsets of groups of unequal size
    - `permutation`: int32 [columns]; stored column j is logical column `permutation[j]`

    >>> q = QTensor.quantize(torch.tensor([[0.0, 1.0, 2.0, 15.0]]), Scheme.parse("int4:channel:asym"))
    >>> q.dequantize()
    tensor([[ 0.,  1.,  2., 15.]])
    """

    scheme: Scheme
    shape: tuple[int, ...]
    codes: Tensor
    scale: "Tensor | QTensor"
    zero: Tensor | None = None
    minimum: "Tensor | QTensor | None" = None
    codebook: Tensor | None = None
    boundaries: Tensor | None = None
    permutation: Tensor | None = None
    dtype: torch.dtype = torch.float32
    axis: int | None = -1

    @classmethod
    def quantize(cls, weight: Tensor, scheme: Scheme, axis: int = -1) -> "QTensor":
        """Round each value of `weight` to the nearest code of its group's minimum-maximum grid.

        Raises InputError for a weight without values, RecipeError for codes that are not integers.
        """
        if weight.dim() == 0 or weight.numel() == 0:
            raise InputError(f"a weight of shape {list(weight.shape)} has no rows of values to quantize; exclude it")
        rows = weight.detach().movedim(axis, -1).reshape(-1, weight.shape[axis]).float()
        if not bool(torch.isfinite(rows).all()):
            raise InputError("a tensor with NaN or infinite values cannot be quantized; repair the model's weights")
        # The grid always holds zero, so that the zeros that fill up a short last group change nothing.
        groups = by_group(rows, scheme.group_of(rows.shape[-1]))
        low, high = groups.amin(-1), groups.amax(-1)
        if scheme.granularity == "tensor":
            low, high = low.amin().view(1, 1), high.amax().view(1, 1)
        scale, zero = range_grid(low, high, scheme)
        return cls.encode(weight, scheme, scale, zero, axis)

    @classmethod
    def encode(cls, weight: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None, axis: int = -1) -> "QTensor":
        """Round `weight` to a given grid (`scale` and `zero` as in the class description)."""
        moved = weight.detach().movedim(axis, -1)
        rows = moved.reshape(-1, moved.shape[-1]).float()
        codes = round_to_grid(rows, scheme, scale, zero)
        return cls(
            scheme, tuple(weight.shape), pack_bits(codes, scheme.bits), scale, zero, dtype=weight.dtype, axis=axis
        )

    @property
    def columns(self) -> int:
        """Length of the group axis; of the whole tensor where that is flattened."""
        return math.prod(self.shape) if self.axis is None else self.shape[self.axis]

    @property
    def rows(self) -> int:
        """Number of rows of the matrix view."""
        return self.codes.shape[0]

    def unpacked(self) -> Tensor:
        """The codes, uint8 [rows, columns], in stored column order."""
        return unpack_bits(self.codes, self.scheme.bits, self.columns)

    def group_index(self) -> Tensor:
        """int64 [columns]: the group of each stored column."""
        columns = torch.arange(self.columns, device=self.codes.device)
        if self.boundaries is not None:
            return torch.bucketize(columns, self.boundaries[1:].to(torch.int64), right=True)
        return columns // self.scheme.group_of(self.columns)

    def dequantize(self) -> Tensor:
        """The tensor this record stands for: `shape`, in `dtype`."""
        codes, scale = self._by_group(self.unpacked()), _floats(self.scale)
        if self.codebook is not None:
            value = self.codebook[codes.long()] * self._spread(scale)
            if self.minimum is not None:
                value = value + self._spread(_floats(self.minimum))
        elif self.minimum is not None:
            value = codes.float() * self._spread(scale) + self._spread(_floats(self.minimum))
        elif self.zero is not None:
            value = (codes.float() - self._spread(self.zero.float())) * self._spread(scale)
        else:
            value = (codes.float() - (self.scheme.levels >> 1)) * self._spread(scale)
        value = value.flatten(1)[:, : self.columns]
        if self.permutation is not None:
            value = value[:, torch.argsort(self.permutation)]
        if self.axis is None:
            return value.reshape(self.shape).to(self.dtype)
        moved = list(self.shape)
        moved.append(moved.pop(self.axis))
        whole: Tensor = value.view(moved).movedim(-1, self.axis).to(self.dtype)
        return whole

    def _by_group(self, values: Tensor) -> Tensor:
        """Columns seen as [rows, groups, group], so that per-group values broadcast; one group where sizes differ."""
        if self.boundaries is not None:
            return values[:, None]
        return by_group(values, self.scheme.group_of(self.columns))

    def _spread(self, values: Tensor) -> Tensor:
        """Per-group values [rows, groups], ready to broadcast over `_by_group`."""
        if self.boundaries is not None:
            return values[:, None, self.group_index()] if values.shape[-1] > 1 else values[:, None]
        return values[..., None]

    def parts(self) -> dict[str, Tensor]:
        """The tensors of the record by name, nested records flattened (`scale.codes`)."""
        found: dict[str, Tensor] = {}
        for name in _PARTS:
            part = getattr(self, name)
            if isinstance(part, QTensor):
                found |= {f"{name}.{inner}": tensor for inner, tensor in part.parts().items()}
            elif part is not None:
                found[name] = part
        return found

    def spec(self) -> str:
        """Everything but the tensors, as one line of JSON; `from_parts(parts, spec)` inverts."""
        return json.dumps(self._spec(), separators=(",", ":"))

    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"scheme": str(self.scheme), "shape": list(self.shape), "parts": []}
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None:
                spec["parts"].append([name, part._spec()] if isinstance(part, QTensor) else name)
        if self.dtype != torch.float32:
            spec["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.axis != -1:
            spec["axis"] = self.axis
        return spec

    @classmethod
    def from_parts(cls, parts: "Sequence[Tensor] | Mapping[str, Tensor]", spec: "str | Mapping[str, Any]") -> "QTensor":
        """Rebuild a record from its tensors (in the order of `parts()`) and its `spec()`.

        >>> q = QTensor.quantize(torch.randn(4, 8), Scheme.parse("int3:g4"))
        >>> again = QTensor.from_parts(list(q.parts().values()), q.spec())
        >>> bool((again.dequantize() == q.dequantize()).all())
        True
        """
        fields: Mapping[str, Any] = json.loads(spec) if isinstance(spec, str) else spec
        pending = list(parts.values() if isinstance(parts, Mapping) else parts)
        return cls._take(pending, fields)

    @classmethod
    def _take(cls, pending: list[Tensor], fields: Mapping[str, Any]) -> "QTensor":
        values: dict[str, Any] = {}
        for part in fields["parts"]:
            if isinstance(part, str):
                values[part] = pending.pop(0)
            else:
                values[part[0]] = cls._take(pending, part[1])
        return cls(
            scheme=Scheme.parse(fields["scheme"]),
            shape=tuple(fields["shape"]),
            dtype=getattr(torch, fields.get("dtype", "float32")),
            axis=fields.get("axis", -1),
            **values,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of the float tensor this record stands for."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    @property
    def by_row(self) -> bool:
        """Whether each row has codes and scales of its own, on both levels where scales are quantized too."""
        nested = [part for part in (self.scale, self.minimum) if isinstance(part, QTensor)]
        return self.axis in (-1, 1) and all(part.by_row and part.rows == self.rows for part in nested)

    def take(self, rows: Tensor) -> "QTensor":
        """The tensor of some of its rows, int64 [count], where it is `by_row`."""

        def of(part: "Tensor | QTensor") -> "Tensor | QTensor":
            if isinstance(part, QTensor):
                return part.take(rows)
            return part[rows] if part.shape[:1] == (self.rows,) else part

        own = {name: part for name in BY_ROW if (part := getattr(self, name)) is not None}
        taken = {name: of(part) for name, part in own.items()}
        return self.with_parts(**taken, shape=(rows.shape[0], self.shape[1]))

    def with_parts(self, **parts: Any) -> "QTensor":
        """A copy with some fields replaced."""
        return replace(self, **parts)


BY_ROW = ("codes", "scale", "zero", "minimum")  # the parts whose rows are those of the tensor
_PARTS = ("codes", "scale", "zero", "minimum", "codebook", "boundaries", "permutation")


def part_names(spec: str) -> list[str]:
    """The names of the parts of a QTensor spec, nested ones as `scale.codes`."""

    def walk(fields: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for part in fields["parts"]:
            if isinstance(part, str):
                yield prefix + part
            else:
                yield from walk(part[1], f"{prefix}{part[0]}.")

    return list(walk(json.loads(spec), ""))


def by_group(values: Tensor, size: int) -> Tensor:
    """Values [rows, columns] as [rows, groups, size]; a short last group is filled up with zeros.

    >>> by_group(torch.arange(6).view(1, 6), 4).tolist()
    [[[0, 1, 2, 3], [4, 5, 0, 0]]]
    """
    missing = -values.shape[-1] % size if size else 0
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    size = max(size, 1)
    return padded.reshape(values.shape[0], padded.shape[1] // size, size)


def round_to_grid(rows: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Nearest codes, uint8 [rows, columns], of float `rows` on the grid (`scale`, `zero`)."""
    steps = torch.round(by_group(rows, scheme.group_of(rows.shape[-1])) / scale.float()[..., None])
    offset = zero.float()[..., None] if zero is not None else float(scheme.levels >> 1)
    codes = (steps + offset).clamp_(0, scheme.levels - 1).to(torch.uint8)
    return codes.flatten(1)[:, : rows.shape[-1]].contiguous()


def _floats(part: "Tensor | QTensor") -> Tensor:
    return part.dequantize() if isinstance(part, QTensor) else part.float()
