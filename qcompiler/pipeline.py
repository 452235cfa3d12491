"""Pass, Contract, and the runner: order, statistics, contracts, and the record of what each pass did.

A pass is a frozen dataclass: its fields are its options. The runner gives it the program and a Context, and checks
afterwards that it did what its contract says; a pass that fails leaves the program as it was.
"""

import abc
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler import calibration
from qcompiler.calibration import Needs, Sample, Segment
from qcompiler.comparison import (
    Doubled,
    finite,
    mean_kl,
    no_writes,
    relative_change,
    rounds,
    same_in_pieces,
    same_values,
    wide_inputs,
    widened,
)
from qcompiler.errors import ContractError, No, PassError, QCompilerError
from qcompiler.journal import Journal
from qcompiler.program import Decoded, Program
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

    @contextmanager
    def reading(self, count: int) -> Iterator[None]:
        """Inside, `samples` are the first `count` calibration sequences; 0 stands for all."""
        everything = self.samples
        try:
            self.samples = calibration.first(everything, count) if count else everything
            yield
        finally:
            self.samples = everything

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
    _decoded: Decoded = field(default_factory=Decoded)
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
            no_writes(versions)
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
            same_values(program, snapshot)
        if step.contract is Contract.LOSSY and not finite(after):
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
        if rounds(program):  # the last bit of a float may decide a code: double precision tells that from an error
            program, samples = widened(program), [wide_inputs(sample) for sample in samples]
            program.tensors = Doubled(program.tensors)
        for sample in samples:
            outputs = program(**sample)
            if program.caches:
                same_in_pieces(program, sample, outputs, self._tolerance([outputs]))
            states = set(program.info.get("caches", {}).values())
            found.append({name: value for name, value in outputs.items() if name not in states})
        return found


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
