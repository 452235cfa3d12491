"""Moving a checkpoint from one format to another: codes are moved as they are, or the conversion is refused."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from qcompiler import artifact
from qcompiler.compiler import capture
from qcompiler.errors import InputError, No
from qcompiler.export import checkpoint_of
from qcompiler.formats.checkpoint import Checkpoint, Format, Lazy, Value
from qcompiler.formats.folder import check_empty
from qcompiler.plugins import lookup, registry
from qcompiler.program import Program
from qcompiler.scheme import QTensor, Scheme
from qcompiler.skeleton import Skeleton

Tell = Callable[["Line"], None]


@dataclass(frozen=True)
class Line:
    """What becomes of one tensor: "lossless", "lossless as floats", "requantized" (with its error), or "refused"."""

    name: str
    outcome: str
    note: str = ""
    error: float = 0.0

    def __str__(self) -> str:
        lost = f", relative error {self.error:.4f}" if self.error else ""
        return f"{self.name}: {self.outcome.upper()}{lost}{f' ({self.note})' if self.note else ''}"


def convert(
    source: Path, out: Path, to: str, *, verify: bool = False, requantize: bool = False, tell: Tell = lambda line: None
) -> list[Line]:
    """Write `source` (a checkpoint in a known format, a compiled folder, a .gguf file) at `out` in the format `to`.

    Each quantized tensor keeps its codes and scales; what the format cannot hold is refused before anything is
    written, or quantized again with `requantize`. Embeddings and heads, which no format quantizes, become float32 of
    the same values. `verify` reads the result and compares every value. Returns a line for each quantized tensor.
    Raises InputError for a refusal, and for a source that cannot be read.
    """
    target: Format = lookup("formats", to)
    if target.write_program is not None:
        return _convert_program(source, out, target, verify, requantize, tell)
    if target.write is None or target.holds is None:
        raise InputError(f'qcompiler reads "{to}" but does not write it; see: qcompiler formats')
    check_empty(out)
    checkpoint = open_checkpoint(source)
    plan = Plan.make(checkpoint, target, requantize)
    for line in plan.lines:
        tell(line)
    if refused := [line for line in plan.lines if line.outcome == "refused"]:
        raise InputError(
            f"{len(refused)} of {len(plan.lines)} tensors cannot be stored as {to} without loss, first "
            f"{refused[0].name}: {refused[0].note}; --requantize rounds them again"
        )
    target.write(replace(checkpoint, tensors=Lazy(plan.makers)), out)
    if verify and target.read:
        compare(plan.makers, target.read(out).tensors)
    return plan.lines


def _convert_program(source: Path, out: Path, target: Format, verify: bool, requantize: bool, tell: Tell) -> list[Line]:
    """Write the program itself, in a format whose clients build its graph by the architecture's name."""
    assert target.write_program is not None
    if requantize:
        raise InputError(f"{target.name} files are quantized by a recipe, not by --requantize; compile with kquant")
    if out.exists():
        raise InputError(f'"{out}" exists; give the name of a new file')
    program = open_program(source)
    lines = [Line(name, "lossless", kind) for name, kind in target.write_program(program, out).items()]
    for line in lines:
        tell(line)
    if verify and target.compare:
        target.compare(program, out)
    return lines


def open_program(source: Path) -> Program:
    """The program of a compiled folder, or of a model with the codes that it is stored with."""
    if artifact.is_artifact(source):
        return artifact.load(source).program
    program = capture(source)
    for name, record in list(program.codes.items()):
        program.quantize_tensor(name, record)
    return program


def open_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint in a folder or file of any kind that qcompiler knows."""
    if artifact.is_artifact(source):
        return checkpoint_of(artifact.load(source).program, source)
    for candidate in registry().formats.values():
        if candidate.read and candidate.detect(source):
            found = candidate.read(source)
            assert isinstance(found, Checkpoint)
            return found
    return checkpoint_of(open_program(source), source if source.is_dir() else None)


@dataclass(frozen=True)
class Plan:
    """What becomes of each quantized tensor, and how every tensor of the result is made."""

    lines: list[Line]
    makers: Mapping[str, Callable[[], Value]]

    @classmethod
    def make(cls, checkpoint: Checkpoint, target: Format, requantize: bool) -> "Plan":
        """Ask the format about every weight, one at a time."""
        linears = Skeleton.of(checkpoint.config, len(checkpoint.tensors)).linears
        found = dict(_asked(checkpoint, target, linears))
        common = _common(found) if target.uniform else None
        lines, makers = [], {}
        for name in checkpoint.tensors:
            read = partial(checkpoint.tensors.__getitem__, name)
            makers[name] = read
            if name not in found:
                if requantize and common is None and name in linears and not found:
                    makers[name] = partial(_again, read, target, None)
                    lines.append(_loss(name, "it was not quantized", read, makers[name]))
                continue
            scheme, answer = found[name]
            if name not in linears:
                makers[name] = partial(_floats, read)
                lines.append(Line(name, "lossless as floats", "only linear layers are stored quantized"))
            elif answer and (common is None or _size(scheme) == _size(common)):
                lines.append(Line(name, "lossless"))
            else:
                why = str(answer) if not answer else f"it is {scheme}, most others {common}, and all must be alike"
                makers[name] = partial(_again, read, target, common)
                lines.append(_loss(name, why, read, makers[name]) if requantize else Line(name, "refused", why))
        if not lines:
            raise InputError(
                "nothing in the model is quantized; compile it with a recipe first, or give --requantize to round it"
            )
        return cls(lines, makers)


def _asked(
    checkpoint: Checkpoint, target: Format, linears: frozenset[str]
) -> Iterator[tuple[str, tuple[Scheme, bool | No]]]:
    """The quantized tensors, with their schemes and whether the format holds them."""
    assert target.holds is not None
    for name in checkpoint.tensors:
        value = checkpoint.tensors[name]
        if isinstance(value, QTensor):
            yield name, (value.scheme, target.holds(value) if name in linears else No("no linear layer"))


def _common(found: Mapping[str, tuple[Scheme, bool | No]]) -> Scheme | None:
    """The scheme that most of the weights have that can be stored; None if none can."""
    held = [scheme for scheme, answer in found.values() if answer]
    if not held:
        return None
    (most, _), *_ = Counter(map(_size, held)).most_common(1)
    return next(scheme for scheme in held if _size(scheme) == most)


def _size(scheme: Scheme) -> tuple[str, int, int]:
    return scheme.code, scheme.bits, scheme.group_size


def _floats(read: Callable[[], Value]) -> Value:
    value = read()
    return value.dequantize().float() if isinstance(value, QTensor) else value


def _again(read: Callable[[], Value], target: Format, like: Scheme | None) -> Value:
    """The values quantized as the format can hold them."""
    assert target.nearest is not None
    value = _floats(read)
    assert isinstance(value, torch.Tensor)
    return target.nearest(value, like)


def _loss(name: str, why: str, read: Callable[[], Value], made: Callable[[], Value]) -> Line:
    """The line about a tensor that is quantized again."""
    before, after = _floats(read), _floats(made)
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    error = (after - before.float()).norm() / before.float().norm().clamp(min=1e-30)
    return Line(name, "requantized", why, float(error))


def compare(wanted: Mapping[str, Callable[[], Value]], found: Mapping[str, Value]) -> None:
    """Compare the values of all tensors, one at a time; InputError names the first that differs by a bit."""
    if set(wanted) != set(found):
        odd = sorted(set(wanted) ^ set(found))
        raise InputError(f'verification failed: the tensor "{odd[0]}" is in one of source and result only')
    for name, make in wanted.items():
        before, after = _floats(make), _floats(partial(found.__getitem__, name))
        assert isinstance(before, torch.Tensor)
        assert isinstance(after, torch.Tensor)
        if before.shape != after.shape or not torch.equal(before.float(), after.float()):
            raise InputError(f'verification failed: "{name}" does not have the values it had; please report this')


# -- which conversions are lossless --------------------------------------------------------------------------


def samples() -> dict[str, QTensor]:
    """One small weight of every kind that formats tell apart, by what it is called."""
    from qcompiler.codebooks import float8_map, quantize_blocks

    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=random)
    found = {
        f"int{bits} {kind}": QTensor.quantize(weight, Scheme.parse(f"int{bits}:g64:{kind}"))
        for bits in (2, 3, 4, 8)
        for kind in ("sym", "asym")
    }
    found["int8 by row"] = QTensor.quantize(weight, Scheme.parse("int8:channel:sym"))
    four = found["int4 asym"]
    found["int4, zero point 0"] = QTensor.quantize(weight.abs(), Scheme.parse("int4:g64:asym"))
    order = torch.argsort(torch.arange(128) % 2, stable=True).to(torch.int32)
    found["int4, act-order"] = four.with_parts(permutation=order)
    assert isinstance(four.scale, torch.Tensor)
    found["int4, float minima"] = four.with_parts(zero=None, minimum=four.scale.float() * -7.3)
    found["int4, float32 scales"] = four.with_parts(scale=four.scale.float() * 1.0001)
    for kind in ("nf4", "fp4"):
        found[kind] = quantize_blocks(weight, kind, 64)
    found["nf4, double"] = quantize_blocks(weight, "nf4", 64, double=True)
    found["nf4, across rows"] = quantize_blocks(weight, "nf4", 4096)
    codes = weight.to(torch.float8_e4m3fn).view(torch.uint8)
    scheme = Scheme.parse("fp8:channel")
    found["float8"] = QTensor(scheme, (64, 128), codes, torch.ones(64, 1), codebook=float8_map())
    return found


def matrix() -> dict[str, dict[str, list[str]]]:
    """For each pair of formats (from, to), the kinds of weights that the first holds and the second does not."""
    known = {name: f for name, f in registry().formats.items() if f.holds}
    kinds = samples()
    held = {name: [kind for kind, record in kinds.items() if f.holds and f.holds(record)] for name, f in known.items()}
    written = [name for name, f in known.items() if f.write or f.write_program]
    return {source: {to: [kind for kind in held[source] if kind not in held[to]] for to in written} for source in known}


def held_kinds(form: Format) -> list[str]:
    """The kinds of weights that a format holds."""
    return [kind for kind, record in samples().items() if form.holds and form.holds(record)]
