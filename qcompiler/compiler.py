"""The front door: capture, compile, explain, load."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from qcompiler import artifact, data
from qcompiler.data import SELF, Calibration
from qcompiler.errors import InputError, No, QCompilerError
from qcompiler.journal import Journal
from qcompiler.pipeline import Context, Pass, Progress, Runner
from qcompiler.plugins import registry
from qcompiler.program import Program
from qcompiler.recipe import Recipe, build, build_backend
from qcompiler.report import Report, versions
from qcompiler.session import Session
from qcompiler.target import Backend, place, refusals_of

DEFAULT_RECIPE = "gptq-w4a16"
DEFAULT_BACKENDS = ("onnxruntime", "reference")


def capture(source: Any, example_inputs: Any = None) -> Program:
    """Turn a model into a Program that reproduces it: callable, printable, verified.

    `source` is a Hugging Face model or its folder, a `.gguf` or `.onnx` file, a `torch.nn.Module` or
    `torch.fx.GraphModule` (with `example_inputs`: a tuple, or a dict by argument name).
    Raises InputError for a source no front end takes, CaptureError for a model that cannot be captured right.
    """
    if isinstance(source, Program):
        return source
    refusals = []
    for front_end in registry().frontends.values():
        answer = front_end.accepts(source)
        if answer:
            program = front_end.capture(source, example_inputs)
            assert isinstance(program, Program)
            program.verify()
            return program
        if isinstance(answer, No):
            refusals.append(str(answer.at(front_end.name)))
    if isinstance(source, (str, Path)) and not Path(source).exists():
        raise InputError(f'"{source}" does not exist; give a model folder, a .gguf or .onnx file, or a model')
    raise InputError(f"no front end takes {_name(source)}: {'; '.join(refusals)}")


def compile(
    model: Any,
    recipe: Any = DEFAULT_RECIPE,
    *,
    calibration: Any = SELF,
    samples: int = 64,
    length: int = 256,
    backend: str | Backend | None = None,
    seed: int = 0,
    strict: bool = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> Session:
    """Compile a model: capture, transform and quantize by the recipe, place and lower; returns a Session.

    `calibration` is "self" (the model writes its own text), a text or JSONL file, an .npz file with an array for each
    input, or a list of texts, tensors or input dicts; it is read only if the recipe needs data. `backend` None means
    the first that takes the program. `strict` turns every refusal into an error. `journal` is a folder where long
    passes write down each block they finish: the same call made again after a crash goes on from there.
    """
    steps = Recipe.parse(recipe)
    backends = _backends(backend)
    wanted = Calibration(calibration, samples, length, seed)
    report = Report(_name(model), steps.name or str(steps), seed=seed, versions=versions())
    context = Context(seed=seed, journal=Journal(Path(journal) if journal else None))
    context.progress = progress or context.progress
    if example_inputs is None:
        example_inputs = data.examples(calibration)
    with _stage(report, "capture"):
        program = capture(model, example_inputs)
        tokenizer = tokenizer_of(program)
    report.captured = {k: v for k, v in program.info.items() if isinstance(v, (str, int, float, bool))}
    report.sizes_mb["float"] = program.nbytes / 1e6
    runner = Runner(context, data.check_samples(program, seed, example_inputs))
    report.passes = runner.records
    before_data = list(takewhile(lambda step: not step.uses_data, steps.passes))
    rest = steps.passes[len(before_data) :]
    with _stage(report, "passes"):
        runner.run(program, before_data, rest)
    if rest:
        report.calibration = wanted.describe()
        with _stage(report, "calibration data"):
            context.samples = data.load(wanted, calibration_writer(program, wanted), tokenizer, context.progress)
        with _stage(report, "data passes"):
            runner.run(program, rest)
    with _stage(report, "lower"):
        placement = place(program, backends)
        files = scratch_folder()
        lowered = placement.backend.lower(program, Path(files.name))
    for refusal in (*placement.refusals, *lowered.refusals):
        report.refuse(refusal)
    _finish(report, program, placement.backend)
    report.details = lowered.details()
    if strict and report.all_refusals:
        raise QCompilerError(f"strict: {len(report.all_refusals)} refusals, the first: {report.all_refusals[0]}")
    return Session(program, lowered, report, tokenizer, files)


def explain(
    model: Any, recipe: Any = DEFAULT_RECIPE, *, backend: str | None = None, example_inputs: Any = None
) -> Report:
    """What `compile` would do, without data and without the expensive steps: layers, sizes, refusals.

    Methods that need data are replaced by plain rounding to the same scheme, so errors are not shown.
    """
    steps = Recipe.parse(recipe)
    program = capture(model, example_inputs).copy()
    report = Report(_name(model), steps.name or str(steps), versions=versions())
    report.captured = {k: v for k, v in program.info.items() if isinstance(v, (str, int, float, bool))}
    report.sizes_mb["float"] = program.nbytes / 1e6
    runner = Runner(Context(), data.check_samples(program))
    report.passes = runner.records
    runner.run(program, [step.plan() for step in steps.passes])
    takers = []
    for candidate in _backends(backend):
        refusals = list(refusals_of(program, candidate))
        takers += [] if refusals else [candidate]
        for refusal in refusals:
            report.refuse(refusal)
    _finish(report, program, takers[0] if takers else None)
    return report


def load(folder: str | Path, backend: str | Backend | None = None) -> Session:
    """Load a saved artifact, on the backend it was compiled for unless another is named.

    A Backend with options of its own lowers the program again, by those options.
    """
    saved = artifact.load(Path(folder))
    compiled_for = str(saved.manifest["backend"])
    chosen = _backends(backend or compiled_for)[0]
    files: Path | tempfile.TemporaryDirectory[str]
    if backend is None or backend == compiled_for:
        files, runner = Path(folder), chosen.load(saved.program, Path(folder))
    else:
        files = scratch_folder()
        runner = place(saved.program, [chosen]).backend.lower(saved.program, Path(files.name))
    read_tokenizer = partial(artifact.tokenizer, Path(folder))
    return Session(saved.program, runner, saved.report, files=files, read_tokenizer=read_tokenizer)


def scratch_folder() -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder for a backend's files; it goes when the session that holds it does."""
    return tempfile.TemporaryDirectory(prefix="qcompiler-", ignore_cleanup_errors=True)


def tokenizer_of(program: Program) -> Any:
    """The tokenizer that belongs to a captured program, read by its front end; None where there is none."""
    front_end = registry().frontends.get(str(program.info.get("frontend")))
    source = program.info.get("tokenizer")
    return front_end.tokenizer(source) if front_end and front_end.tokenizer and source else None


def calibration_writer(program: Program, wanted: Calibration) -> Program:
    """The program that writes calibration text: with a cache if it can have one."""
    if wanted.source != SELF or program.caches or "logits" not in program.outputs:
        return program
    copy = program.copy()
    steps: Sequence[Pass] = [build("kv_cache", {})] if "kv_cache" in registry().passes else []
    try:
        Runner(Context(), data.check_samples(copy)).run(copy, steps)
    except QCompilerError:
        return program  # no cache possible: it writes without one, slower
    return copy


def _finish(report: Report, program: Program, backend: Backend | None) -> None:
    report.backend = backend.name if backend else ""
    report.sizes_mb["compiled"] = program.nbytes / 1e6
    report.coverage = coverage(program)


def coverage(program: Program) -> dict[str, Any]:
    """How much of the program is quantized: linear layers, and bytes of weights counted as float32."""
    from qcompiler.ops import qc

    quantized, floats = list(program.calls(qc.linear, qc.integer_linear)), program.linears()
    decoded = sum(program.qtensor(name).dequantized_bytes for name in program.quantized)
    rest = sum(tensor.nbytes for name, tensor in program.tensors.items() if "::" not in name)
    share = decoded / (decoded + rest) if decoded + rest else 0.0
    return {
        "linears": len(quantized) + len(floats),
        "quantized": len(quantized),
        "bytes_share": round(share, 4),
        "float_layers": [str(node.meta.get("path", node.name)) for node in floats],
    }


def _backends(backend: "str | Backend | None") -> list[Backend]:
    if isinstance(backend, Backend):
        return [backend]
    if backend is not None:
        return [build_backend(backend)]
    return [registry().backends[name]() for name in DEFAULT_BACKENDS if name in registry().backends]


def _name(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


@contextmanager
def _stage(report: Report, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.stages[name] = time.perf_counter() - start
