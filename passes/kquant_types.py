"""Weights as GGUF's types: scales of one level or two, found by the search of kquant_search.py."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompiler.bits import pack_bits
from qcompiler.errors import InputError
from qcompiler.formats.gguf_blocks import IQ4, Kind
from qcompiler.formats.gguf_types import KINDS
from qcompiler.formats.k_quants import SUPERBLOCK, level
from qcompiler.passes.kquant_search import Levels, Line, fit_line, fit_scale, inverse, line_codes
from qcompiler.scheme import QTensor

TYPES = tuple(name for name in KINDS if name != "MXFP4")
CHUNK = 1 << 18  # values searched at once: what a processor's cache holds
SMALLEST = 2.0**-24  # the smallest number above zero of float16
TURNS = 2  # how often scales and codes of a superblock are fitted to each other


def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> QTensor:
    """The matrix `weight` [n, k] as one of TYPES, with little error weighted by `importance` [k].

    Raises InputError for rows that are no whole blocks, and values or an importance that are not finite numbers.
    """
    of = KINDS[kind]
    if weight.dim() != 2 or weight.shape[1] % of.block or not weight.numel():
        raise InputError(f"{kind} stores matrices with rows of whole blocks of {of.block}, not {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise InputError("a tensor with NaN or infinite values cannot be quantized; repair the model's weights")
    if importance is not None and not (bool(torch.isfinite(importance).all()) and bool((importance >= 0).all())):
        raise InputError("an importance that is negative or not finite weighs nothing; measure it again")
    pieces = [_piece(rows, of, importance) for rows in _pieces(weight.detach().float())]
    return joined(pieces, weight)


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(max(1, CHUNK // weight.shape[1]))


def joined(pieces: list[QTensor], weight: Tensor) -> QTensor:
    """The rows of the records below each other."""
    first = pieces[0]
    parts: dict[str, Tensor | QTensor] = {"codes": torch.cat([p.codes for p in pieces])}
    for name in ("scale", "minimum", "zero"):
        found = [getattr(p, name) for p in pieces]
        if isinstance(found[0], QTensor):
            parts[name] = joined(found, torch.empty(sum(f.shape[0] for f in found), found[0].shape[1]))
        elif found[0] is not None:
            parts[name] = torch.cat(found)
    return first.with_parts(shape=tuple(weight.shape), dtype=weight.dtype, **parts)


def _piece(rows: Tensor, kind: Kind, importance: Tensor | None) -> QTensor:
    w = weights(rows, kind, importance)
    group = kind.scheme.group_size
    x, w = rows.unflatten(1, (-1, group)), w.unflatten(1, (-1, group))
    if kind.second is None:
        return _lines(x, w, kind) if kind.minima else _scales(x, w, kind)
    groups = (-1, SUPERBLOCK // group)
    x, w = x.unflatten(1, groups), w.unflatten(1, groups)
    return _two_level_lines(x, w, kind) if kind.minima else _two_level_scales(x, w, kind)


def weights(rows: Tensor, kind: Kind, importance: Tensor | None) -> Tensor:
    """How much each value's error counts; [rows, columns].

    The importance of its channel (a channel that calibration never saw still counts a little), times the root of its
    own square plus its block's mean square: large weights matter more than the plain squared error says, which gives
    3-bit files a larger perplexity.
    """
    squares = rows.unflatten(1, (-1, kind.block)).square()
    own: Tensor = (squares + squares.mean(-1, keepdim=True)).sqrt_().clamp_(min=1e-30).flatten(1)
    if importance is None:
        return own
    return own * importance.float().clamp(min=float(importance.mean()) * 1e-4 + 1e-30)


def _levels(kind: Kind) -> Levels:
    if kind.codebook is not None:
        return Levels(IQ4[0], IQ4[-1], IQ4)
    half = kind.scheme.levels >> 1
    return Levels(-half, half - 1)


def _record(kind: Kind, codes: Tensor, scale: "Tensor | QTensor", minimum: "Tensor | QTensor | None" = None) -> QTensor:
    """A record of codes uint8 [rows, ..., group]."""
    flat = codes.flatten(1)
    book = None if kind.codebook is None else torch.tensor(kind.codebook)
    packed = pack_bits(flat, kind.scheme.bits)
    return QTensor(kind.scheme, tuple(flat.shape), packed, scale, minimum=minimum, codebook=book)


def _stored(values: Tensor) -> Tensor:
    """As float16 holds them, what would vanish as its smallest; InputError for what it does not reach."""
    stored = values.half()
    stored = torch.where((stored == 0) & (values != 0), SMALLEST * values.sign().half(), stored)
    if not bool(torch.isfinite(stored).all()):
        raise InputError("its values reach beyond what float16 scales can say; scale the tensor down, or exclude it")
    return stored


def _scales(x: Tensor, w: Tensor, kind: Kind) -> QTensor:
    """Q4_0, Q5_0, Q8_0, IQ4_NL."""
    levels = _levels(kind)
    scale = _stored(fit_scale(x, w, levels, tries=24))
    return _record(kind, levels.places(x * inverse(scale.float())[..., None]), scale)


def _lines(x: Tensor, w: Tensor, kind: Kind) -> QTensor:
    """Q4_1, Q5_1."""
    top = kind.scheme.levels - 1
    line = Line(*(_stored(part) for part in fit_line(x, w, top, below=False)))
    codes = line_codes(x, Line(line.scale.float(), line.minimum.float()), top).to(torch.uint8)
    return _record(kind, codes, line.scale, line.minimum)


def _two_level_scales(x: Tensor, w: Tensor, kind: Kind) -> QTensor:
    """Q3_K, Q6_K, IQ4_XS: x and w are [rows, superblocks, groups, group]."""
    assert kind.second is not None
    levels, half = _levels(kind), kind.second.levels >> 1
    outer = Levels(-half, half - 1)
    scale, best, loss = fit_scale(x, w, levels), None, None
    for _ in range(1 + TURNS):
        q = levels.nearest(x * inverse(scale)[..., None])
        curve = (w * q.square()).sum(-1)
        target = (w * q * x).sum(-1) / curve.clamp(min=1e-30)
        step = _stored(fit_scale(target, curve, outer, tries=32))
        places = outer.places(target * inverse(step.float())[..., None])
        scale = (places.float() - half) * step.float()[..., None]
        inner = x * inverse(scale)[..., None]
        value = levels.nearest(inner.clone()) * scale[..., None]
        lost = (w * (x - value).square()).sum((-1, -2))
        found = (levels.places(inner), places, step)
        best, loss = _better(found, lost, best, loss)
    assert best is not None
    codes, places, step = best
    return _record(kind, codes, level(kind.name, places, step))


def _better(
    found: tuple[Tensor, ...], lost: Tensor, best: tuple[Tensor, ...] | None, loss: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of each superblock the attempt that lost less; `lost` is [rows, superblocks]."""
    if best is None or loss is None:
        return found, lost
    better = lost < loss
    kept = tuple(
        torch.where(better.reshape(better.shape + (1,) * (new.dim() - 2)), new, old)
        for new, old in zip(found, best, strict=True)
    )
    return kept, torch.where(better, lost, loss)


def _two_level_lines(x: Tensor, w: Tensor, kind: Kind) -> QTensor:
    """Q2_K, Q4_K, Q5_K: x and w are [rows, superblocks, groups, group]."""
    assert kind.second is not None
    top, outer = kind.scheme.levels - 1, Levels(0, kind.second.levels - 1)
    whole, line, best, loss = w.sum(-1), fit_line(x, w, top, below=True), None, None
    for _ in range(1 + TURNS):
        q = line_codes(x, line, top)
        wq = w * q
        sq, sqq, sqx, sx = wq.sum(-1), (wq * q).sum(-1), (wq * x).sum(-1), (w * x).sum(-1)
        # By turns: the scales' codes given the minima, the minima's given the scales.
        minimum = line.minimum
        for _ in range(2):
            scales, step = _unsigned((sqx - minimum * sq) / sqq.clamp(min=1e-30), sqq, outer)
            scale = scales.float() * step.float()[..., None]
            minima, low = _unsigned((scale * sq - sx) / whole.clamp(min=1e-30), whole, outer)
            minimum = -minima.float() * low.float()[..., None]
        line = Line(scale, minimum)
        codes = line_codes(x, line, top)
        value = codes * scale[..., None] + minimum[..., None]
        lost = (w * (x - value).square()).sum((-1, -2))
        best, loss = _better((codes.to(torch.uint8), scales, step, minima, low), lost, best, loss)
    assert best is not None
    codes, scales, step, minima, low = best
    return _record(kind, codes, level(kind.name, scales, step), level(kind.name, minima, -low))


def _unsigned(values: Tensor, curve: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., groups] from zero upwards, and their steps, float16 [...]."""
    values = values.clamp(min=0)
    step = _stored(fit_scale(values, curve, levels, tries=32))
    return levels.places(values * inverse(step.float())[..., None]), step
