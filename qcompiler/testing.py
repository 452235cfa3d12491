"""The conformance kit: what a pass owes its users, asked of it on small programs.

    from qcompiler.testing import assert_conforms

    def test_my_pass() -> None:
        assert_conforms(MyPass, scheme=Scheme.parse("int4:g32"))

`check_pass` gives the single answers. Both take further programs, for a pass that only acts on some of its own kind.
"""

import dataclasses
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, fx

from qcompiler import data
from qcompiler.comparison import in_double
from qcompiler.errors import ContractError, QCompilerError, RecipeError
from qcompiler.pipeline import Context, Contract, Pass, Runner
from qcompiler.plugins import registry
from qcompiler.program import Input, Program, Type
from qcompiler.recipe import Recipe
from qcompiler.report import PassRecord
from qcompiler.scheme import QTensor, Scheme
from qcompiler.sites import Kind, Site, find

aten = torch.ops.aten
ROWS = 24
EASY = ("constant weights", "zero weights")  # any grid can hold these nearly, so that even 2 bits must not lose them
LOST = 0.95  # of the outputs
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Outcome:
    """The answer to one check: passed, skipped with a reason, or failed with what is wrong.

    >>> str(Outcome("zero weights", failure="the outputs are no longer finite"))
    'zero weights: FAIL: the outputs are no longer finite'
    """

    check: str
    failure: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        verdict = f"FAIL: {self.failure}" if self.failure else f"skip: {self.skipped}" if self.skipped else "pass"
        return f"{self.check}: {verdict}"


def assert_conforms(subject: Pass | type[Pass], /, *programs: Program, **options: Any) -> None:
    """AssertionError with every failed check of `check_pass`, one a line."""
    failures = [str(outcome) for outcome in check_pass(subject, *programs, **options) if outcome.failure]
    assert not failures, "\n".join(failures)


def check_pass(subject: Pass | type[Pass], /, *programs: Program, **options: Any) -> list[Outcome]:
    """Ask everything of a pass (an instance, or a type to be made with `options`); `programs` are tried too.

    Global state that the pass changes is reported and put back.
    """
    step = subject(**options) if isinstance(subject, type) else dataclasses.replace(subject, **options)
    with _Globals() as state:
        outcomes = [*_declaration(step), *_on_programs(step, programs), *_on_data(step), *_determinism(step, programs)]
    changed = f"it changed {', '.join(state.changed)}; leave global state alone" if state.changed else ""
    return [*outcomes, Outcome("global state", changed)]


# -- the checks ----------------------------------------------------------------------------------------------------


def check_sites(program: Program, kind: Kind, seed: int = 0) -> tuple[int, float]:
    """Transform every site of a canonical program at random, all at once, in double precision.

    Returns how many sites there are, and the largest change of an output relative to the largest output.
    """
    random_numbers = torch.Generator().manual_seed(seed)
    changed = in_double(program)
    samples = [
        {name: value.double() if value.is_floating_point() else value for name, value in sample.items()}
        for sample in data.check_samples(program, seed)
    ]
    before = [_real_outputs(changed, sample) for sample in samples]
    sites = find(changed, kind)
    for site in sites:
        transform(changed, site, random_numbers)
    after = [_real_outputs(changed, sample) for sample in samples]
    largest = max(float(value.abs().max()) for value in before)
    return len(sites), max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) / largest


def transform(program: Program, site: Site, generator: torch.Generator) -> None:
    """Transform a site at random, by what it admits."""
    size = (site.blocks, site.channels)
    if site.kind is Kind.PERMUTE:
        site.permute(program, torch.rand(size, generator=generator).argsort(-1))
    elif site.kind is Kind.SCALE:
        site.scale(program, torch.rand(size, generator=generator, dtype=torch.float64) + 0.5)
    elif site.kind is Kind.SIGN:
        site.flip(program, torch.randint(0, 2, size, generator=generator) * 2 - 1)
    else:
        mixed = torch.randn(*size, site.channels, generator=generator, dtype=torch.float64)
        site.rotate(program, torch.linalg.qr(mixed)[0])


def _real_outputs(program: Program, sample: Mapping[str, Tensor]) -> Tensor:
    """The first output, at real tokens: at padding it means nothing."""
    output, mask = program(**sample)[program.outputs[0]], sample.get("attention_mask")
    return output if mask is None or mask.shape != output.shape[:2] else output[mask.bool()]


def _declaration(step: Pass) -> Iterator[Outcome]:
    """What can be asked without running it."""
    kind = type(step)
    frozen = "__dataclass_params__" in vars(kind) and vars(kind)["__dataclass_params__"].frozen
    yield Outcome("frozen dataclass", "" if frozen else f"write @dataclass(frozen=True) above class {kind.__name__}")
    named = re.fullmatch(r"[\w.-]+", step.name)
    yield Outcome("name", "" if named else f'a name is letters, digits, "_", "-" and ".", not "{step.name}"')
    yield Outcome("docstring", "" if _written(kind) else "say in a docstring what the pass does; it is shown to users")
    bare = [f.name for f in dataclasses.fields(step) if f.default is dataclasses.MISSING]
    yield Outcome("defaults", f"options without a default: {', '.join(bare)}" if bare else "")
    planned = step.plan()
    yield Outcome("plan", f'plan() gives "{planned}", which needs data' if planned.uses_data else "")
    yield _round_trip(step)


def _written(kind: type) -> bool:
    generated = f"{kind.__name__}("  # what @dataclass writes where there is no docstring
    return bool(kind.__doc__) and not str(kind.__doc__).startswith(generated)


def _round_trip(step: Pass) -> Outcome:
    if registry().passes.get(step.name) is not type(step):
        return Outcome("recipe text", skipped=f'no installed plugin lists "{step.name}"')
    try:
        again = Recipe.parse([str(step)]).passes
    except RecipeError as error:
        return Outcome("recipe text", f'"{step}" cannot be read back: {error}')
    return Outcome("recipe text", "" if again == (step,) else f'"{step}" is read back as "{Recipe(again)}"')


def _on_programs(step: Pass, programs: Sequence[Program]) -> Iterator[Outcome]:
    """Every program the kit knows, and those given: contract, finiteness, no writes, reasons."""
    suited = False
    for name, program in [*_subjects(step), *((f"given program {i}", p) for i, p in enumerate(programs))]:
        trial = Trial.of(step, program)
        suited |= trial.record is not None and (trial.record.changed or bool(trial.record.refusals))
        yield trial.outcome(name)
        if step.contract is Contract.LOSSY and trial.record and not (trial.record.changed or trial.record.refusals):
            yield Outcome(f"{name}: a reason", "it changed nothing and refused nothing")
        change = (trial.record and trial.record.output_change) or 0.0
        if name in EASY and not change < LOST:
            yield Outcome(f"{name}: what is left", f"the outputs changed by {change:.0%}; mind a range of zero")
    yield Outcome("a program it acts on", "" if suited else "it acts on none; give one: check_pass(MyPass, program)")
    yield Trial.of(step, idle_program()).outcome("a program without weights")


def _on_data(step: Pass) -> Iterator[Outcome]:
    """Without calibration data a pass works, or says that it needs some."""
    [(_, program), *_] = _subjects(step)
    trial = Trial.of(step, program, samples=())
    if not step.uses_data:
        yield trial.outcome("without calibration data")
    elif trial.record is not None:
        yield Outcome("without calibration data", "uses_data is True, and yet it runs without data")
    else:
        yield Outcome("without calibration data", trial.failure)


def _determinism(step: Pass, programs: Sequence[Program]) -> Iterator[Outcome]:
    """The same seed gives the same program."""
    for program in [_subjects(step)[0][1], *programs]:
        first, second = Trial.of(step, program), Trial.of(step, program)
        if first.record is None or second.record is None:
            yield Outcome("determinism", skipped=first.refusal or first.failure)
        elif first.program.fingerprint() != second.program.fingerprint():
            yield Outcome("determinism", "two runs with one seed differ; draw from ctx.generator() only")
        else:
            yield Outcome("determinism")


@dataclass(frozen=True)
class Trial:
    """One run of a pass over a copy of a program: its record, its refusal, or its failure."""

    program: Program
    record: PassRecord | None = None
    refusal: str = ""
    failure: str = ""

    @classmethod
    def of(cls, step: Pass, program: Program, samples: Sequence[Mapping[str, Tensor]] | None = None) -> "Trial":
        """Run `step` through the pipeline's runner, with random calibration data unless `samples` are given."""
        copy, checks = program.copy(), data.check_samples(program)
        context = Context(checks if samples is None else samples)
        originals = {name: (tensor, tensor.clone()) for name, tensor in program.tensors.items()}
        expected = program(**checks[0])
        runner = Runner(context, checks, exact_tolerance=_tolerance(expected))
        try:
            runner.run(copy, [step])
            found = copy(**checks[0])
        except QCompilerError as error:
            crashed = not isinstance(error.__cause__, QCompilerError)  # the runner wraps what a pass raises
            if crashed or isinstance(error, ContractError) or not str(error):
                return cls(copy, failure=str(error) or f"an empty {type(error).__name__}")
            return cls(copy, refusal=str(error))
        except Exception as error:  # noqa: BLE001 - a stranger's `needs` may raise anything
            return cls(copy, failure=f"{type(error).__name__}: {error}")
        record = runner.records[-1]
        return cls(copy, record, failure=_written_to(originals) or _unlike(expected, found) or _unreasoned(record))

    def outcome(self, check: str) -> Outcome:
        """The trial as the answer to a check."""
        return Outcome(check, self.failure, self.refusal)


def _tolerance(outputs: Mapping[str, Tensor]) -> float:
    """How far rounding alone may move the outputs of an exact pass, relative."""
    return max(2e-4, *(8 * torch.finfo(v.dtype).eps for v in outputs.values() if v.is_floating_point()))


def _written_to(originals: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    for name, (now, before) in originals.items():
        if not torch.equal(now, before):
            return f'it wrote into tensor "{name}" in place; store a new tensor instead'
    return ""


def _unlike(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    for name, value in expected.items():
        if name not in found:
            return f'output "{name}" is gone'
        if found[name].dtype != value.dtype:
            return f'output "{name}" was {value.dtype} and now is {found[name].dtype}'
    return ""


def _unreasoned(record: PassRecord) -> str:
    return "it refused something without a reason" if any(not text.strip(" :") for text in record.refusals) else ""


# -- global state ----------------------------------------------------------------------------------------------------


def _numpy_state() -> Any:
    state: Any = numpy.random.get_state()  # noqa: NPY002 - the global state is what is watched
    return state[0], state[1].tobytes(), state[2:]


def _set_environment(values: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


# name -> how to read it (as something comparable), and how to put it back
_STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's random state": (
        lambda: torch.get_rng_state().numpy().tobytes(),
        lambda v: torch.set_rng_state(torch.tensor(list(v), dtype=torch.uint8)),
    ),
    "Python's random state": (random.getstate, random.setstate),
    "NumPy's random state": (
        _numpy_state,
        lambda v: numpy.random.set_state((v[0], numpy.frombuffer(v[1], dtype=numpy.uint32), *v[2])),  # noqa: NPY002
    ),
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the environment": (lambda: dict(os.environ), _set_environment),
    "the working directory": (os.getcwd, os.chdir),
}


class _Globals:
    """Sees which global state changed inside, and puts it back."""

    changed: Sequence[str] = ()

    def __enter__(self) -> "_Globals":
        self.before = {name: read() for name, (read, _) in _STATE.items()}
        return self

    def __exit__(self, *error: object) -> None:
        self.changed = [name for name, (read, _) in _STATE.items() if read() != self.before[name]]
        for name in self.changed:
            _STATE[name][1](self.before[name])


# -- the programs ----------------------------------------------------------------------------------------------------


def _subjects(step: Pass) -> list[tuple[str, Program]]:
    """The programs a pass is tried on; a layout pass gets them quantized."""
    schemes = [v for v in vars(step).values() if isinstance(v, Scheme)]
    group = next((s.group_size for s in schemes if s.group_size), 32)
    programs = {
        "3-D activations": mlp_program(2 * group),
        "2-D activations": mlp_program(2 * group, rank=2),
        "ragged groups": mlp_program(group + group // 2 + 3),
        "rows shorter than a group": mlp_program(max(3, group // 2 - 1)),
        "tied weights": tied_program(2 * group),
    }
    programs |= {f"{kind} weights": mlp_program(2 * group, weights=kind) for kind in WEIGHTS if kind != "normal"}
    programs |= {f"{str(d).removeprefix('torch.')} tensors": mlp_program(2 * group, dtype=d) for d in DTYPES}
    if step.contract is Contract.LAYOUT:
        for program in programs.values():
            quantize(program)
    return list(programs.items())


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])


def _outlier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = _normal(shape, generator)
    values[0, 0] = 50.0
    return values


WEIGHTS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": _normal,
    "constant": lambda shape, generator: torch.full(shape, 0.03),
    "zero": lambda shape, generator: torch.zeros(shape),
    "outlier": _outlier,
}


class _Sketch:
    """A program under construction."""

    def __init__(self, dtype: torch.dtype, weights: str = "normal") -> None:
        self.graph, self.dtype = fx.Graph(), dtype
        self.tensors: dict[str, Tensor] = {}
        self.make, self.random = WEIGHTS[weights], torch.Generator().manual_seed(0)

    def input(self, name: str, kind: Type) -> fx.Node:
        self.inputs = (Input(name, kind),)
        node = self.graph.placeholder(name)
        node.meta = {"type": kind, "path": ""}
        return node

    def weight(self, name: str, *shape: int) -> fx.Node:
        if name not in self.tensors:
            self.tensors[name] = self.make(shape, self.random).to(self.dtype)
        node = self.graph.get_attr(name)
        node.meta = {"type": Type(shape, self.dtype), "path": name.rpartition(".")[0]}
        return node

    def call(self, target: Any, *args: Any, to: tuple[Any, ...], path: str = "block") -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {"type": Type(to, self.dtype), "path": path}
        return node

    def linear(self, x: fx.Node, path: str, rows: int, columns: int) -> fx.Node:
        weight = self.weight(f"{path}.weight", rows, columns)
        return self.call(aten.linear.default, x, weight, to=(*x.meta["type"].shape[:-1], rows), path=path)

    def done(self, name: str, value: fx.Node, **info: Any) -> Program:
        self.graph.output((value,))
        program = Program(self.graph, self.tensors, self.inputs, (name,), info)
        program.verify()
        return program


def mlp_program(
    columns: int = 64, rank: int = 3, dtype: torch.dtype = torch.float32, weights: str = "normal"
) -> Program:
    """A gated MLP over x [batch, (sequence,) columns]; `weights` is one of `WEIGHTS`."""
    sk = _Sketch(dtype, weights)
    lead = ("batch", "sequence")[: rank - 1]
    x = sk.input("x", Type((*lead, columns), dtype))
    gate, up = (sk.linear(x, f"block.{name}", ROWS, columns) for name in ("gate", "up"))
    h = sk.call(aten.mul.Tensor, sk.call(aten.silu.default, gate, to=(*lead, ROWS)), up, to=(*lead, ROWS))
    return sk.done("output", sk.linear(h, "block.down", columns, ROWS))


def tied_program(columns: int = 64, vocabulary: int = 40) -> Program:
    """An embedding, a linear layer, and a head that shares the embedding's weight; gives logits."""
    sk, lead = _Sketch(torch.float32), ("batch", "sequence")
    ids = sk.input("input_ids", Type(lead, torch.int64))
    words = sk.weight("embedding.weight", vocabulary, columns)
    x = sk.call(aten.embedding.default, words, ids, to=(*lead, columns), path="embedding")
    x = sk.linear(x, "block.mix", columns, columns)
    return sk.done("logits", sk.linear(x, "embedding", vocabulary, columns), vocab_size=vocabulary)


def idle_program() -> Program:
    """A program that holds no weights: there is nothing for most passes to do."""
    sk = _Sketch(torch.float32)
    x = sk.input("x", Type(("batch", 8), torch.float32))
    return sk.done("output", sk.call(aten.relu.default, x, to=("batch", 8)))


def quantize(program: Program) -> None:
    """Round all weights of a program's linear layers to 4 bits, stored wider than they need to be."""
    for name in dict.fromkeys(str(node.args[1].target) for node in program.linears()):  # type: ignore[union-attr]
        q = QTensor.quantize(program.tensors[name], Scheme.parse("int4:g32"))
        assert isinstance(q.scale, Tensor)
        wide = q.with_parts(scale=q.scale.float(), zero=torch.full_like(q.scale, 8, dtype=torch.uint8))
        program.quantize_tensor(name, wide)
