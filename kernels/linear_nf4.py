"""linear_nf4: a float activation times a weight whose codes of 4 bits stand for the entries of a codebook (NF4, FP4).

As linear_wq, but for the entries, which are looked up in registers (codebook.py): exactly, in three instructions to a
weight. A scale that is quantized itself (bitsandbytes' double quantization) is decoded when the weight is packed: it
would save 0.12 bits of 4.25, three bytes in a hundred, and cost a look-up in memory for every row of every group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import No
from qcompiler.kernels import linear_wq
from qcompiler.kernels.codebook import Tables, load_tables, look_up
from qcompiler.kernels.cost import H200, Cost, Device, device_of
from qcompiler.kernels.linear_wq import constants
from qcompiler.kernels.packed_weight import COLUMNS, ROWS, PackedWeight, group_of, tile_columns
from qcompiler.kernels.planes import LEAST, half_of
from qcompiler.kernels.sass import Build
from qcompiler.kernels.split import Config, add_parts, leave_part, room_for, store_sums
from qcompiler.scheme import QTensor, Scheme
from qcompiler.target import Accept, Answer, Kernel, bits, channel_or_group, matrix, without

BITS = 4


def _has_tables(weight: QTensor) -> Answer:
    if weight.codebook is None:
        return No("has no codebook")
    return next((no for dtype in LEAST if isinstance(no := Tables.of(weight.codebook, dtype), No)), True)


ACCEPTS = (
    bits(BITS)
    & Accept("codebook()", _has_tables)
    & channel_or_group(32, 64, 128, 256, 512, 1024, 2048, 4096)
    & matrix()
    & without("zero", "minimum", "boundaries")
)
KERNEL = Kernel("linear_nf4", "linear", ACCEPTS)


@triton.jit
def linear_nf4_kernel(
    x,
    words,
    scales,
    tables,
    row_scale,
    bias,
    partial,
    arrived,
    out,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """x [tokens, K] times the packed weight [N, K] transposed, plus bias [N], into out [tokens, N].

    Programs and `partial` as those of linear_wq_kernel; `tables` int32 [8].
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = BK // 4
    STEPS: tl.constexpr = (K + BK - 1) // BK
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    RAGGED: tl.constexpr = STEPS * BK > K or EACH * SPLIT > STEPS
    FULL: tl.constexpr = (N + BN - 1) // BN * BN
    tl.static_assert(GROUP % WIDTH == 0 and (BK % GROUP == 0 or GROUP % BK == 0))

    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = split * EACH
    n = tile * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    i = tl.arange(0, WIDTH)
    words_at = words + tile * (STEPS * BN * WIDTH) + tl.arange(0, BN)[:, None] * WIDTH + i[None, :]
    x_at = x + m[None, :] * K + first * BK + i[:, None]
    there = m[None, :] < tokens
    table = load_tables(tables)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, first + EACH):
        mask = there
        here = tl.minimum(step, STEPS - 1) if RAGGED else step
        raw = tl.load(words_at + here * BN * WIDTH)
        for start in tl.static_range(0, BK, WIDTH):  # where the columns of a plane start
            if start % (2 * GROUP) == 0:
                shares = tl.load(scales + (here * BK + start) // (2 * GROUP) * FULL + n)
            if start % GROUP == 0:
                scale = half_of(shares, (here * BK + start) // GROUP, DTYPE)
            if RAGGED:
                mask = there & (step * BK + start + i[:, None] < K)
            columns = tl.load(x_at + start, mask=mask, other=0.0)
            acc = tl.dot(look_up(raw, scale, table, start // WIDTH), columns, acc)
        x_at += BK
    if SPLIT > 1:
        SUM: tl.constexpr = BM * FULL
        part_at = partial + m[None, :] * FULL + n[:, None]
        if leave_part(acc, part_at, arrived + tile, split, SUM, SPLIT):
            return
        acc = add_parts(acc, part_at, arrived + tile, SUM, SPLIT)
    store_sums(acc, row_scale, bias, out, m, n, tokens, N, HAS_BIAS)


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedCodebook(PackedWeight):
    """A weight [n, k] with a codebook: its words hold the places of its codes in the tables (codebook.py).

    - `places`: uint8 [16], the place of each code
    - `tables`: int32 [8]
    - `codebook`: float32 [16]
    - `unit`: what entries are multiplied by after they were looked up; it is in `row_scale` already
    """

    places: Tensor
    tables: Tensor
    codebook: Tensor
    unit: float

    @classmethod
    def pack(cls, weight: QTensor, dtype: torch.dtype = torch.float16, columns: int = 0) -> "PackedCodebook":
        """Pack a weight that `ACCEPTS` takes, as PackedWeight.pack does. Codes and codebook are kept exactly."""
        assert weight.codebook is not None
        tables = Tables.of(weight.codebook, dtype)
        assert isinstance(tables, Tables)
        places = tables.places.to(weight.codes.device)
        scale = weight.scale.dequantize() if isinstance(weight.scale, QTensor) else weight.scale
        codes = pack_bits(places[weight.unpacked().int()], BITS)
        packed = PackedWeight.pack(weight.with_parts(codes=codes, scale=scale, codebook=None), dtype, columns)
        return cls(
            **vars(packed) | {"row_scale": packed.row_scale * (tables.unit * LEAST[dtype])},
            places=places,
            tables=tables.registers.to(places.device),
            codebook=weight.codebook,
            unit=tables.unit,
        )

    def unpack(self) -> QTensor:
        """The record that was packed: codes and codebook exactly, scales as they were rounded, on one level."""
        row_scale = self.row_scale / (self.unit * LEAST[self.dtype])
        plain = PackedWeight.unpack(replace(self, row_scale=row_scale))
        codes = torch.argsort(self.places).to(torch.uint8)[plain.unpacked().int()]
        return plain.with_parts(codes=pack_bits(codes, BITS), codebook=self.codebook)


def configure(n: int, k: int, columns: int, tokens: int, device: Device = H200) -> Config:
    """As linear_wq does, but for 64 tokens the registers of 4 warps do not hold sums and tables."""
    chosen = linear_wq.configure(n, k, columns, BITS, tokens, device)
    return replace(chosen, warps=8) if chosen.tokens >= 64 else chosen


def linear_nf4(x: Tensor, weight: PackedCodebook, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x [..., k], contiguous, in the weight's dtype, times the weight [n, k] transposed, plus bias [n]: [..., n].

    With a permuted weight (act-order) x holds its channels in the stored order: the op before stores them so.
    """
    n, k = weight.shape
    tokens = x.numel() // k
    chosen = config or configure(n, k, weight.columns, tokens, device_of(x))
    tiles = weight.words.shape[0]
    out, partial = room_for(x, n, tiles, chosen)
    linear_nf4_kernel[tiles, chosen.split, triton.cdiv(tokens, chosen.tokens)](
        x,
        weight.words,
        weight.scales,
        weight.tables,
        weight.row_scale,
        out if bias is None else bias,
        partial,
        weight.arrived,
        out,
        tokens,
        HAS_BIAS=bias is not None,
        **constants(weight.shape, weight.group, weight.columns, chosen),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return out


def cost(weight: PackedCodebook, tokens: int, device: Device = H200) -> Cost:
    """What a launch reads, writes and computes."""
    return linear_wq.cost(weight, tokens, device)


ARGUMENTS = {name: kind for name, kind in linear_wq.ARGUMENTS.items() if name != "zeros"} | {"tables": "*i32"}
BUDGET = 4.1  # instructions for a weight that an H200 has time for: 16 tokens or fewer, groups of 64 or more


def build(text: str, n: int, k: int, tokens: int, dtype: str = "fp16", device: Device = H200) -> Build:
    """What is compiled for a weight [n, k] of a scheme such as "nf4:g64" and `tokens` tokens."""
    scheme = Scheme.parse(text)
    columns = tile_columns(scheme, n, k)
    config = configure(n, k, columns, tokens, device)
    held = tokens <= 16 and columns == COLUMNS[BITS]
    return Build(
        name=f"linear_nf4 {text} {dtype} {n}x{k} M={tokens}",
        kernel=linear_nf4_kernel,
        arguments=ARGUMENTS | dict.fromkeys(("x", "bias", "out"), f"*{dtype}"),
        constants={"HAS_BIAS": True, **constants((n, k), group_of(scheme, k, columns), columns, config)},
        handled=ROWS * columns,
        budget=BUDGET if held else 0.0,
        warps=config.warps,
        stages=config.stages,
    )


def builds(device: Device = H200) -> Iterator[Build]:
    """The configurations that ship, for layers of a model of 8 billion parameters."""
    large, small = (14336, 4096), (4096, 4096)
    for tokens in (1, 16, 32, 64, 128):
        yield build("nf4:g64:sym", *large, tokens, device=device)
    yield build("nf4:g64:sym", *large, 16, "bf16", device)
    yield build("nf4:g64:sym", *small, 16, device=device)
    yield build("nf4:g128:sym", *large, 16, device=device)
    yield build("nf4:g32:sym", *large, 16, device=device)
