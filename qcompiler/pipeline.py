"""Pass, Contract, and the runner: order, statistics, contracts, and the record of what each pass did.

A pass is a frozen dataclass: its fields are its options. The runner gives it the program and a Context, and checks
afterwards that it did what its contract says; a pass that fails leaves the program as it was.
"""

import abc
import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler import calibration
from qcompiler.calibration import Needs, Sample, Segment
from qcompiler.errors import ContractError, No, PassError, QCompilerError
from qcompiler.journal import Journal
from qcompiler.ops import qc
from qcompiler.program import Program
from qcompiler.report import LayerRecord, Meter, PassRecord

NOISE = 8.0  # times what the last bit of every weight does to the outputs an exact pass may change
Progress = Callable[[str, int, int], None]  # what, done, total


class Contract(enum.Enum):
    """What a pass does to the function the program computes."""

    EXACT = "exact"  # nothing: permute, scale, rotate, fuse
    LOSSY = "lossy"  # changes it: quantize
    LAYOUT = "layout"  # stores the same numbers in another way: every dequantized value stays bit-identical


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One step of a recipe.

    `name` and `contract` are class attributes; `preserves` says that statistics measured before the pass stay true,
    `wants_floats` that it reads `ctx.floats`.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    preserves: ClassVar[bool] = False
    wants_floats: ClassVar[bool] = False

    def needs(self, program: Program) -> Needs:
        """Statistics to measure before `run`, by node name; they come back as `ctx.statistics`."""
        return {}

    @abc.abstractmethod
    def run(self, program: Program, ctx: "Context") -> None:
        """Change `program`; refusals and layer records go to `ctx`."""

    def plan(self) -> "Pass":
        """The pass that does the same to the program's structure without data, for `explain`."""
        return self

    @property
    def uses_data(self) -> bool:
        """Whether the pass needs calibration data."""
        return type(self).needs is not Pass.needs

    def __str__(self) -> str:
        """The pass as recipe text, options that are not the default only: `gptq{scheme=int4:g64:asym}`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        shown = [f"{name}={_option(value)}" for name, value in values.items()]
        return f"{self.name}{{{' '.join(shown)}}}" if shown else self.name


def _option(value: Any) -> str:
    return "|".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass
class Context:
    """What a pass may use besides the program.

    `samples` is the calibration data, `statistics` what `needs()` asked for, `seed` the only source of chance;
    in `journal` a long pass writes down the segments it finished. `floats` is the program as it was before anything
    lossy, for passes that want it.
    """

    samples: Sequence[Sample] = ()
    seed: int = 0
    progress: Progress = lambda what, done, total: None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    record: PassRecord = field(default_factory=lambda: PassRecord("", "", ""))
    node: fx.Node | None = None
    journal: Journal = field(default_factory=Journal)
    floats: Program | None = None

    def refuse(self, no: No) -> None:
        """Keep a refusal for the report."""
        self.record.refusals.append(str(no))

    def note(self, text: str) -> None:
        """Keep a remark for the report."""
        self.record.notes.append(text)

    def layer(self, layer: LayerRecord) -> None:
        """Keep what was done to one tensor."""
        self.record.layers.append(layer)

    def generator(self) -> torch.Generator:
        """A fresh random generator with the context's seed; the global one is never touched."""
        return torch.Generator().manual_seed(self.seed)

    def sweep(
        self, program: Program, needs: Callable[[Sequence[fx.Node]], Needs], changes: bool = True
    ) -> Iterator[Segment]:
        """Sweep the calibration data over the program; see `calibration.sweep`."""
        return calibration.sweep(program, self.samples, needs, self.progress, changes)

    def each(self, nodes: Sequence[fx.Node], what: str) -> Iterator[fx.Node]:
        """The nodes one by one, with progress, remembering the current one for error messages."""
        for i, node in enumerate(nodes):
            self.progress(what, i, len(nodes))
            self.node = node
            yield node
        self.node = None
        self.progress(what, len(nodes), len(nodes))


@dataclass
class Runner:
    """Runs passes over a program, checking each.

    `checks` are sample inputs on which contracts are checked; `exact_tolerance` is the relative change of outputs
    that an exact pass may cause through rounding.
    """

    context: Context
    checks: Sequence[Sample]
    exact_tolerance: float = 2e-4
    records: list[PassRecord] = field(default_factory=list)
    _outputs: list[dict[str, Tensor]] | None = None
    _decoded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _measured: dict[tuple[str, Any], Any] = field(default_factory=dict)

    def run(self, program: Program, passes: Sequence[Pass], ahead: Sequence[Pass] = ()) -> None:
        """Run `passes` in order; those `ahead` will be run by another call.

        Raises PassError or ContractError; the program is then as before the failing pass.
        """
        for i, step in enumerate(passes):
            self.context.progress(f"pass {step.name}", i, len(passes))
            self._keep_floats(program, step, [*passes[i:], *ahead])
            self._measure(program, passes[i:])
            self._run_one(program, step)

    def _keep_floats(self, program: Program, step: Pass, ahead: Sequence[Pass]) -> None:
        """Hold on to the program as it was before the first lossy pass, for as long as one ahead wants it."""
        if not any(later.wants_floats for later in ahead):
            self.context.floats = None
        elif self.context.floats is None and step.contract is Contract.LOSSY:
            self.context.floats = program.copy()

    def _measure(self, program: Program, ahead: Sequence[Pass]) -> None:
        """Measure what the next pass needs, and its neighbours while each preserves, in one sweep."""
        needs: dict[str, Any] = {}
        wanted = _needs(ahead[0], program)
        missing = {n: s for n, s in wanted.items() if (n, s) not in self._measured}
        if missing and not self.context.samples:
            raise PassError(f'pass "{ahead[0].name}" needs calibration data and there is none; give some')
        if missing:
            batches = [missing]
            for step, following in pairwise(ahead):
                if not step.preserves:
                    break
                batches.append({n: s for n, s in _needs(following, program).items() if (n, s) not in self._measured})
            for needs in _compatible(batches):
                found = calibration.measure(program, self.context.samples, needs, self.context.progress)
                self._measured |= {(n, needs[n]): value for n, value in found.items()}
        self.context.statistics = {n: self._measured[n, s] for n, s in wanted.items() if (n, s) in self._measured}

    def _run_one(self, program: Program, step: Pass) -> None:
        record = PassRecord(step.name, str(step), step.contract.value)
        self.context.record = record
        before, snapshot = program.fingerprint(), program.copy()
        versions = {name: (t, t._version) for name, t in program.tensors.items() if not t.is_inference()}
        record.nodes = (len(program.graph.nodes), 0)
        record.megabytes = (program.nbytes / 1e6, 0.0)
        if self._outputs is None:
            self._outputs = self._evaluate(program)
        try:
            with Meter() as meter, torch.no_grad():
                step.run(program, self.context)
                program.clean()
                program.verify()
            _no_writes(step, versions)
            record.changed = program.fingerprint() != before
            if record.changed:
                self._check(program, snapshot, step, record)
        except Exception as error:  # a pass may be a stranger's code
            program.restore(snapshot)
            raise _blame(step, self.context.node, error) from error
        finally:
            self.context.node = None
        if record.changed and not step.preserves:
            self._measured.clear()
        record.seconds, record.peak_rss_mb = meter.seconds, meter.peak_rss_mb
        record.nodes = (record.nodes[0], len(program.graph.nodes))
        record.megabytes = (record.megabytes[0], program.nbytes / 1e6)
        self.records.append(record)

    def _check(self, program: Program, snapshot: Program, step: Pass, record: PassRecord) -> None:
        """Hold the pass to its contract; raises ContractError."""
        assert self._outputs is not None
        after = self._evaluate(program)
        record.output_change = max(
            (
                relative_change(old, new, sample.get("attention_mask"))
                for sample, old, new in zip(self.checks, self._outputs, after, strict=True)
            ),
            default=0.0,
        )
        record.kl = mean_kl(self._outputs, after)
        if step.contract is Contract.EXACT and not record.output_change <= self._tolerance(after):
            allowed = max(self._tolerance(after), NOISE * self._noise(snapshot))
            if not record.output_change <= allowed:
                raise ContractError(
                    f"it is declared exact but changed the outputs by {record.output_change:.2e} "
                    f"(allowed {allowed:.0e}) on the check samples"
                )
        if step.contract is Contract.LAYOUT:
            _same_values(program, snapshot)
        if step.contract is Contract.LOSSY and not _finite(after):
            raise ContractError("the outputs are no longer finite after it")
        self._outputs = after

    def _noise(self, program: Program) -> float:
        """How much the outputs change where every stored weight changes in its last bit: deep networks amplify it."""
        shaken, chance = program.copy(), self.context.generator()
        for name, tensor in program.tensors.items():
            if tensor.is_floating_point() and tensor.dim() > 1 and "::" not in name:
                last_bit = (torch.rand(tensor.shape, generator=chance) - 0.5) * torch.finfo(tensor.dtype).eps
                shaken.tensors[name] = (tensor * (1 + last_bit)).to(tensor.dtype)
        pairs = zip(self.checks, self._evaluate(program), self._evaluate(shaken), strict=True)
        return max((relative_change(a, b, sample.get("attention_mask")) for sample, a, b in pairs), default=0.0)

    def _tolerance(self, outputs: Sequence[Mapping[str, Tensor]]) -> float:
        """What an exact pass may change: `exact_tolerance`, or a few roundings of a narrower dtype."""
        kinds = {value.dtype for found in outputs for value in found.values() if value.is_floating_point()}
        return max([self.exact_tolerance, *(4 * torch.finfo(kind).eps for kind in kinds)])

    def _evaluate(self, program: Program) -> list[dict[str, Tensor]]:
        """Outputs (without caches) on the check samples; a program with caches also runs in two pieces."""
        found = []
        program = program.decoded(self._decoded)
        samples = self.checks
        if _rounds(program):  # the last bit of a float may decide a code: double precision tells that from an error
            program, samples = _widened(program), [_wide_inputs(sample) for sample in samples]
            program.tensors = _Doubled(program.tensors)
        for sample in samples:
            outputs = program(**sample)
            if program.caches:
                _same_in_pieces(program, sample, outputs, self._tolerance([outputs]))
            states = set(program.info.get("caches", {}).values())
            found.append({name: value for name, value in outputs.items() if name not in states})
        return found


def in_double(program: Program) -> Program:
    """A copy that computes in double precision throughout."""
    copy = _widened(program)
    copy.tensors = {name: t.double() if t.is_floating_point() else t for name, t in copy.tensors.items()}
    return copy


def _widened(program: Program) -> Program:
    """A copy whose calls name double precision wherever they name a float type."""
    copy = program.copy()
    for node in copy.calls():
        node.args = tuple(map(_wide, node.args))
        node.kwargs = {name: _wide(value) for name, value in node.kwargs.items()}
    return copy


class _Doubled(dict[str, Tensor]):
    """Stored tensors that are doubled when they are read, so that a large program is never held twice over.

    For running only: a copy of it holds the tensors as they are.
    """

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return tensor.double() if tensor.is_floating_point() else tensor


def _wide(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def _wide_inputs(sample: Sample) -> Sample:
    return {name: value.double() if value.is_floating_point() else value for name, value in sample.items()}


def _rounds(program: Program) -> bool:
    """Whether activations are rounded, as such or inside attention."""
    inside = ("key", "value", "levels")
    return any(n.target is qc.fake_quantize or any(n.kwargs.get(k) for k in inside) for n in program.calls())


def _needs(step: Pass, program: Program) -> dict[str, Any]:
    """What a pass asks to be measured; PassError if asking fails."""
    try:
        return dict(step.needs(program))
    except Exception as error:  # a pass may be a stranger's code
        raise _blame(step, None, error) from error


def _compatible(batches: Sequence[Needs]) -> list[dict[str, Any]]:
    """Merge needs into as few sweeps as possible: one, unless two ask different statistics of the same node."""
    sweeps: list[dict[str, Any]] = []
    for batch in batches:
        for node, statistic in batch.items():
            home = next((s for s in sweeps if s.get(node, statistic) == statistic), None)
            if home is None:
                sweeps.append({node: statistic})
            else:
                home[node] = statistic
    return sweeps


def _blame(step: Pass, node: fx.Node | None, error: Exception) -> QCompilerError:
    """The error with the names of the pass and the node it was at; a stranger's error becomes a PassError."""
    where = f' at node "{node.name}" ({node.meta.get("path", "")})' if node is not None else ""
    if isinstance(error, QCompilerError):
        return type(error)(f'pass "{step.name}"{where}: {error}')
    return PassError(f'pass "{step.name}"{where}: {type(error).__name__}: {error}')


def _no_writes(step: Pass, versions: Mapping[str, tuple[Tensor, int]]) -> None:
    for name, (tensor, version) in versions.items():
        if tensor._version != version:
            raise ContractError(f'it wrote into tensor "{name}" in place; store a new tensor instead')


def _same_values(program: Program, snapshot: Program) -> None:
    """Every quantized tensor that was there before still stands for the same numbers, bit for bit."""
    for name in snapshot.quantized:
        if name not in program.quantized or _parts(program, name) == _parts(snapshot, name):
            continue
        if not torch.equal(program.qtensor(name).dequantize(), snapshot.qtensor(name).dequantize()):
            raise ContractError(f'it is declared a layout change but "{name}" no longer dequantizes to the same bits')
    for name in program.quantized:
        if name in snapshot.tensors and not torch.equal(program.qtensor(name).dequantize(), snapshot.tensors[name]):
            raise ContractError(f'it is declared a layout change but "{name}" is not the same tensor, bit for bit')


def _parts(program: Program, name: str) -> list[int]:
    """The identities of a quantized tensor's parts: equal lists are the same record."""
    return [id(part) for part in program.qtensor(name).parts().values()]


def _same_in_pieces(program: Program, sample: Sample, whole: Mapping[str, Tensor], tolerance: float) -> None:
    """Prefill, then the rest over the cache, must give what one run gives; raises ContractError."""
    first = program.inputs[0].name
    length = sample[first].shape[1]
    outputs: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    pieces = []
    for start, stop in ((0, length // 2), (length // 2, length)):
        inputs = {name: _piece(name, value, start, stop) for name, value in sample.items()}
        outputs = program(**inputs, **state)
        state = program.cache_updates(outputs)
        pieces.append(outputs[program.outputs[0]])
    joined = {program.outputs[0]: torch.cat(pieces, dim=1)}
    change = relative_change({program.outputs[0]: whole[program.outputs[0]]}, joined, real=sample.get("attention_mask"))
    if not change <= tolerance:
        raise ContractError(f"prefill then decode differs from one run by {change:.2e} (allowed {tolerance:.0e})")


def _piece(name: str, value: Tensor, start: int, stop: int) -> Tensor:
    # The padding mask covers the past too; ids and positions are those of the new tokens.
    return value[:, :stop] if name == "attention_mask" else value[:, start:stop]


def relative_change(old: Mapping[str, Tensor], new: Mapping[str, Tensor], real: Tensor | None = None) -> float:
    """Largest absolute difference of any output, relative to that output's largest magnitude.

    With `real` [batch, sequence], only positions where it is nonzero count.
    """
    worst = 0.0
    for name, before in old.items():
        if name not in new:
            raise ContractError(f'output "{name}" is gone')
        after = new[name]
        if before.shape != after.shape:
            raise ContractError(f'output "{name}" had shape {tuple(before.shape)} and now has {tuple(after.shape)}')
        if not before.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(before, after) else float("inf"))
            continue
        if real is not None and real.shape == before.shape[:2]:
            before, after = before[real != 0], after[real != 0]
        worst = max(worst, _change(before.double(), after.double()))
    return worst


def _change(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference relative to the largest finite magnitude; equal infinities do not differ."""
    differing = before != after
    if not bool(differing.any()):
        return 0.0
    size = before.abs()[before.isfinite()]
    scale = max(size.max().item() if size.numel() else 0.0, 1e-30)
    change = (after - before).abs()[differing].max().item() / scale
    return float("inf") if math.isnan(change) else change


def mean_kl(old: Sequence[Mapping[str, Tensor]], new: Sequence[Mapping[str, Tensor]]) -> float | None:
    """Mean KL divergence (nats) of the predictions in output "logits"; None where there is no such output."""
    if not old or "logits" not in old[0]:
        return None
    total, count = 0.0, 0
    for before, after in zip(old, new, strict=True):
        p, q = before["logits"].double().log_softmax(-1), after["logits"].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        total, count = total + kl.sum().item(), count + kl.numel()
    return total / max(count, 1)


def _finite(outputs: Sequence[Mapping[str, Tensor]]) -> bool:
    return all(bool(torch.isfinite(v).all()) for out in outputs for v in out.values() if v.is_floating_point())
