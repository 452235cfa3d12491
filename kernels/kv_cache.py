"""QuantizedCache: keys or values in few bits; KvWindow: the tokens beside it that keep their floats.

The codes of a token lie in planes along its channels (planes.py): it is stored without reading what is there, and read
in the order of the tensor cores. With 3 bits a token's keys and values share a cell of 16 planes: 48 bits for each 16
channels of both, 3.0 bits to a channel, with nothing lost between them.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler.errors import No
from qcompiler.kernels.codebook import Tables
from qcompiler.kernels.planes import LEAST, MAGNIFY, Cells
from qcompiler.rounding import NF4
from qcompiler.scheme import Scheme
from qcompiler.target import Answer

KEY_PLANES = 8  # of the cell that a token's keys and values share


@dataclass(frozen=True, eq=False)
class FloatCache:
    """Keys and values [batch, kv_heads, capacity, d] as they are."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class QuantizedCache:
    """Keys or values of 3, 4 or 8 bits, or NF4.

    - `words`: int16 [batch, kv_heads, capacity, d * bits / 16]: channel j * width + i in plane j of word i; of 3 bits
      [batch, kv_heads, capacity, 3, d / 8], keys and values in the same words, `place` being the first plane
    - `grids`: int32 [batch, kv_heads, capacity], or one more axis of groups of channels: the scale of a token in the
      low half and the zero point in the high one, both float16; of keys with a scale for each channel over blocks of
      tokens [batch, kv_heads, blocks, 2, d]: what codes are multiplied by, and what is added, in the dtype of queries
    """

    scheme: Scheme
    words: Tensor
    grids: Tensor
    place: int = 0

    @classmethod
    def empty(
        cls, scheme: str, batch: int, heads: int, capacity: int, d: int, device: str | torch.device = "cpu"
    ) -> "QuantizedCache":
        """Room for `capacity` tokens of `d` channels, a power of two from 64 on, in 4 or 8 bits: what `suits` takes."""
        kind = Scheme.parse(scheme)
        words = torch.zeros(batch, heads, capacity, d * kind.bits // 16, dtype=torch.int16, device=device)
        return cls(kind, words, _grids(kind, words, d))

    @classmethod
    def pair(
        cls, key: str, value: str, batch: int, heads: int, capacity: int, d: int, device: str | torch.device = "cpu"
    ) -> "tuple[QuantizedCache, QuantizedCache]":
        """Room for keys and for values."""
        kinds = Scheme.parse(key), Scheme.parse(value)
        if kinds[0].bits != 3:
            return cls.empty(key, batch, heads, capacity, d, device), cls.empty(
                value, batch, heads, capacity, d, device
            )
        words = torch.zeros(batch, heads, capacity, 3, d // KEY_PLANES, dtype=torch.int16, device=device)
        grids = [_grids(kind, words, d) for kind in kinds]
        return cls(kinds[0], words, grids[0]), cls(kinds[1], words, grids[1], KEY_PLANES)

    @property
    def d(self) -> int:
        """Channels of a token."""
        return self.words.shape[-1] * self.planes

    @property
    def planes(self) -> int:
        """Planes of a token."""
        return KEY_PLANES if self.scheme.bits == 3 else 16 // self.scheme.bits

    @property
    def groups(self) -> int:
        """Groups of channels with a scale of their own."""
        return self.grids.shape[3] if self.grids.dim() == 4 else 1

    def codes(self) -> Tensor:
        """The codes, uint8 [batch, kv_heads, capacity, d]; of NF4 in their own order."""
        whole, bits = self.words.int() & 0xFFFF, self.scheme.bits
        if bits == 3:
            top = (whole[..., 0, :] >> 15 << 2) | (whole[..., 1, :] >> 15 << 1) | whole[..., 2, :] >> 15
            cell = [whole[..., j // 5, :] >> (3 * (j % 5)) & 7 for j in range(15)] + [top]
            planes = cell[self.place : self.place + KEY_PLANES]
        else:
            planes = [whole >> (bits * j) & ((1 << bits) - 1) for j in range(16 // bits)]
        found = torch.stack(planes, dim=-2).flatten(-2)
        if self.scheme.code == "nf":
            found = torch.argsort(nf4(torch.float16).places)[found]
        return found.to(torch.uint8)


def _grids(kind: Scheme, words: Tensor, d: int) -> Tensor:
    batch, heads, capacity = words.shape[:3]
    groups = d // kind.group_of(d)
    shape = (batch, heads, capacity) if groups == 1 else (batch, heads, capacity, groups)
    return torch.zeros(shape, dtype=torch.int32, device=words.device)


@functools.cache
def nf4(dtype: torch.dtype, device: str = "cpu") -> Tables:
    """The tables of NF4, as codebook.look_up reads them; a code has the same place for both kinds of queries."""
    tables = Tables.alike(torch.tensor(NF4), *LEAST)
    assert not isinstance(tables, No)
    found = tables[list(LEAST).index(dtype)]
    return replace(found, registers=found.registers.to(device))


def spread(scheme: Scheme, dtype: torch.dtype, shares: bool) -> float:
    """What a code that was unpacked is to be multiplied by: as it is, or times a share of a block's unit."""
    if scheme.code == "nf":
        return nf4(dtype).unit / (MAGNIFY[dtype] if shares else 1.0)
    return 1.0 / (MAGNIFY[dtype] * LEAST[dtype]) if shares else 512.0


@dataclass(frozen=True, eq=False)
class KvWindow:
    """The tokens that keep their floats: the `first` of a sequence, the newest `recent`, and what a block lacks.

    `keys` and `values` [batch, kv_heads, first + ring, d]: token t of a sequence in place t if it is one of the first,
    and t modulo the ring, behind those. With `block` > 0 keys have a scale for each channel over so many tokens, whose
    unit is in `units`, float32 [batch, kv_heads, blocks]; a value that is no longer recent, while its key waits for its
    block to fill, is in the ring as rounded.
    """

    keys: Tensor
    values: Tensor
    units: Tensor
    recent: int
    first: int
    block: int

    @property
    def ring(self) -> int:
        """Tokens in the ring."""
        return self.keys.shape[2] - self.first

    @property
    def ahead(self) -> int:
        """How many new tokens at once leave those in the ring that are still needed; into an empty cache go any."""
        return self.ring - self.recent - self.block


def windowed(
    caches: tuple[QuantizedCache, QuantizedCache],
    dtype: torch.dtype,
    recent: int = 0,
    first: int = 0,
    block: int = 0,
    ahead: int = 16,
) -> tuple[QuantizedCache, QuantizedCache, KvWindow]:
    """Empty caches as `QuantizedCache.pair` makes them, with a window of floats in `dtype`; as qc.attention says."""
    keys, values = caches
    batch, heads, capacity = keys.words.shape[:3]
    device = keys.words.device
    blocks = -(-capacity // block) if block else 1
    if block:
        grids = torch.zeros(batch, heads, blocks, 2, keys.d, dtype=dtype, device=device)
        keys = replace(keys, grids=grids)
    floats = torch.zeros(2, batch, heads, first + recent + block + ahead, keys.d, dtype=dtype, device=device)
    units = torch.zeros(batch, heads, blocks, device=device)
    return keys, values, KvWindow(floats[0], floats[1], units, recent, first, block)


def accepts(scheme: str) -> Answer:
    """Whether a cache of this scheme has one scale for each token: whole numbers of 4 or 8 bits."""
    kind = Scheme.parse(scheme)
    if kind.code != "int" or kind.bits not in (4, 8):
        return No(f"a cache of {kind.code}{kind.bits} codes, not int4 or int8")
    return (kind.granularity == "token" and kind.dynamic) or No(
        f"a cache of scheme {scheme} has no scale for each token"
    )


def suits(key: str, value: str, d: int, block: int = 0) -> Answer:
    """Whether attention_kvq takes keys and values of these schemes, with heads of d channels.

    >>> suits("int4:g32:asym:dynamic", "nf4:token:dynamic", 128)
    No(reason='keys of int4 beside values of nf4', where='')
    """
    kinds = Scheme.parse(key), Scheme.parse(value)
    names = [f"{kind.code}{kind.bits}" for kind in kinds]
    if names[0] != names[1]:
        return No(f"keys of {names[0]} beside values of {names[1]}")
    if names[0] not in ("int3", "int4", "int8", "nf4"):
        return No(f"a cache of {names[0]} codes, not int3, int4, int8 or nf4")
    if not all(kind.dynamic for kind in kinds):
        return No("a cache of static ranges")
    if d & (d - 1) or d < (128 if kinds[0].bits == 3 else 64):
        return No(f"heads of {d} channels")
    if block and (kinds[0].granularity != "channel" or block not in (32, 64, 128)):
        return No(f"keys of {key} over blocks of {block} tokens, not one scale for each channel over 32, 64 or 128")
    planes = KEY_PLANES if kinds[0].bits == 3 else Cells.of(kinds[0].bits).planes
    for kind in kinds[1 if block else 0 :]:
        size = kind.group_of(d)
        if kind.granularity not in ("token", "group") or d % size or size % (d // planes) or d // size > 4:
            return No(f"a cache of scheme {kind}, whose groups are not one to four of whole planes of {d // planes}")
    return True
