"""The command line. Results go to stdout, progress and errors to stderr; `--json` prints JSON alone."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qcompiler import __version__, cli_formats, show
from qcompiler.errors import BackendError, InputError, No, QCompilerError
from qcompiler.progress import Reporter
from qcompiler.source import FORMS, is_artifact, resolve

# What takes seconds to import is imported by the commands that need it: --help should come at once.

DEFAULT_RECIPE = "gptq-w4a16"

app = typer.Typer(
    name="qcompiler",
    help="A quantizing compiler for model graphs. A model goes in, a smaller and faster one comes out, with a report.",
    epilog=f"MODEL is {FORMS}. An error exits with 2 and one sentence; --debug shows where it came from.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{FORMS[0].upper()}{FORMS[1:]}.")]
Folder = Annotated[str, typer.Argument(metavar="DIR", help="A folder that qcompiler compile wrote.")]
Either = Annotated[str, typer.Argument(metavar="DIR|MODEL", help=f"A compiled folder, {FORMS}.")]
RecipeText = Annotated[
    str, typer.Option("--recipe", "-r", help="A named recipe, a YAML file, or passes: 'fuse, rtn{scheme=int4:g64}'.")
]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", help="What runs it, with options as in onnxruntime{threads=2}; see qcompiler plugins."),
]
Seed = Annotated[int, typer.Option("--seed", help="The only source of chance.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, as QCOMPILER_DEBUG=1 does.")] = False,
) -> None:
    """Options of every command; `--debug` is acted upon in `__main__`."""


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; one qcompiler wrote is replaced.")],
    recipe: RecipeText = DEFAULT_RECIPE,
    calibration: Annotated[
        str, typer.Option(help="A text, JSONL or .npz file (arrays), or self: the model writes its own text.")
    ] = "self",
    samples: Annotated[int, typer.Option(help="Calibration sequences, or samples.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in each of them.")] = 256,
    backend: BackendName = None,
    opset_only: Annotated[
        bool, typer.Option("--opset-only", help="Write operators of the ONNX standard only, for other runtimes.")
    ] = False,
    seed: Seed = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Make every refusal an error.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a model and save the result with its report (report.html, report.json) in a folder.

    The same command after a crash goes on after the last block that was finished.
    """
    from qcompiler.compiler import compile
    from qcompiler.data import Calibration, check_source

    _check_out(out)
    Calibration(calibration, samples, length)
    if calibration != "self":
        check_source(Path(calibration))  # complain now, not after the capture
    source = resolve(model)
    journal = out.resolve().parent / f".{out.name}.journal"
    with Reporter() as progress:
        progress("reading and capturing the model", 0, 0)
        session = compile(
            source.model,
            recipe,
            calibration=calibration,
            samples=samples,
            length=length,
            backend=_standard_only(backend) if opset_only else backend,
            seed=seed,
            strict=strict,
            example_inputs=source.example_inputs,
            progress=progress,
            journal=journal,
        )
        progress("saving", 0, 0)
        session.save(out)
        shutil.rmtree(journal, ignore_errors=True)
    if as_json:
        _print_json({"folder": str(out), "size_mb": _size_mb(out), "report": asdict(session.report)})
        return
    console = Console()
    console.print(show.report_view(session.report))
    console.print(f"\nSaved in {out} ({_size_mb(out):.0f} MB); the report is {out / 'report.html'}", markup=False)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to add at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token, 1 samples as predicted.")] = 0.0,
    backend: BackendName = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue a text; on a terminal it appears as it is written."""
    from qcompiler.compiler import load

    _check_artifact(folder)
    if not prompt:
        raise InputError("the prompt is empty; give a text to continue")
    with Reporter() as progress:
        progress("loading", 0, 0)
        session = load(folder, backend)
    live = sys.stdout.isatty() and not as_json
    text = session.generate(
        prompt, max_new_tokens, temperature=temperature, seed=seed, on_token=_typewriter() if live else None
    )
    if as_json:
        _print_json({"prompt": prompt, "text": text})
    else:
        typer.echo("" if live else text)


@app.command()
def evaluate(
    model: Either,
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file to predict.")],
    baseline: Annotated[str | None, typer.Option(metavar="DIR|MODEL", help="What to compare with.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Use this many windows, from the start; default: all.")] = None,
    backend: BackendName = None,
    as_json: Json = False,
) -> None:
    """How well a model predicts a text, in windows that do not overlap; a float MODEL runs in PyTorch.

    JSON keys: perplexity; with a baseline also kl (mean KL(baseline || model), nats a token), top1 (share of
    tokens with the same most likely successor) and baseline_perplexity, else null.
    """
    from qcompiler.evaluate import compare, encode

    content = _read_text(text)
    with Reporter() as progress:
        run, tokenizer = _runnable(model, backend, progress)
        tokens = encode(tokenizer, content)
        reference = _runnable(baseline, None, progress)[0] if baseline else None
        quality = compare(run, reference, tokens, length, windows, progress)
    if as_json:
        _print_json(asdict(quality))
        return
    facts = {"perplexity": f"{quality.perplexity:.3f}"}
    if quality.kl is not None and quality.top1 is not None and quality.baseline_perplexity is not None:
        ratio = quality.perplexity / quality.baseline_perplexity
        facts["baseline"] = f"{quality.baseline_perplexity:.3f} (the model's is {ratio:.3f} x)"
        facts["KL"] = f"{quality.kl:.5f} nats a token"
        facts["top-1"] = f"{quality.top1:.1%} of the tokens agree"
    Console().print(show.facts_table(facts))


@app.command()
def bench(
    folder: Folder,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens to read in.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate, one by one.", min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Medians of this many rounds.", min=1)] = 3,
    backend: BackendName = None,
    as_json: Json = False,
) -> None:
    """Time a compiled model in a fresh process.

    JSON keys: prefill_tokens_per_s, decode_tokens_per_s, ms_per_token (batch 1, medians over the repeats);
    load_s (from load() to ready), peak_rss_mb (of the process, load and generation), size_mb (the folder).
    """
    from qcompiler.bench import Job, measure_apart

    _check_artifact(folder)
    found = measure_apart(Job(str(folder), backend, prompt_tokens, new_tokens, repeats))
    if as_json:
        _print_json(found)
        return
    facts = {
        "prefill": f"{found['prefill_tokens_per_s']:.1f} tokens/s ({prompt_tokens} tokens)",
        "decode": f"{found['decode_tokens_per_s']:.1f} tokens/s, {found['ms_per_token']:.1f} ms a token",
        "load": f"{found['load_s']:.2f} s",
        "peak memory": f"{found['peak_rss_mb']:.0f} MB",
        "size on disk": f"{found['size_mb']:.1f} MB",
    }
    Console().print(show.facts_table(facts))


@app.command("bench-child", hidden=True)
def bench_child() -> None:
    """Do the job that stands on stdin as JSON, and print what was measured as one line of JSON."""
    from qcompiler.bench import Job, measure
    from qcompiler.compiler import load

    job = Job(**json.load(sys.stdin))
    try:
        with Reporter() as progress:
            found = measure(job, load, progress)
    except QCompilerError as error:
        found = {"error": str(error)}
    typer.echo(json.dumps(found))


@app.command()
def inspect(
    model: Either,
    sites: Annotated[
        bool,
        typer.Option(
            "--sites", help="Which channels may be permuted, scaled, rotated or flipped together, and why not."
        ),
    ] = False,
    drawing: Annotated[Path | None, typer.Option("--draw", help="Draw the sites into this SVG file.")] = None,
    as_json: Json = False,
) -> None:
    """What is inside: of a compiled folder layers, schemes, sizes, errors, refusals; of a MODEL its graph."""
    from qcompiler import artifact
    from qcompiler.calibration import mark_segments

    if sites or drawing:
        _inspect_sites(model, drawing, as_json)
        return
    report = None
    if is_artifact(model):
        saved = artifact.load(Path(model))
        program, report = saved.program, saved.report
    else:
        program = _capture(model)
    mark_segments(program)
    facts = show.program_facts(program)
    if as_json:
        _print_json({"program": facts, "report": asdict(report) if report else None})
        return
    console = Console()
    if report:
        console.print(show.report_view(report, layers=True))
    console.print(show.program_view(facts))


def _inspect_sites(model: str, drawing: Path | None, as_json: bool) -> None:
    from qcompiler.data import check_samples
    from qcompiler.pipeline import Context, Runner
    from qcompiler.recipe import build
    from qcompiler.sites_view import draw, sites_facts, sites_view

    if is_artifact(model):
        raise InputError("sites are found before quantization; give the model itself, not a compiled folder")
    program = _capture(model)
    with Reporter() as progress:
        progress("finding sites", 0, 0)
        Runner(Context(), check_samples(program)).run(program, [build("canonicalize", {})])
        facts = sites_facts(program)
    if drawing:
        drawing.write_text(draw(facts), encoding="utf-8")
    if as_json:
        _print_json(facts)
    else:
        Console().print(sites_view(facts))


@app.command()
def explain(
    model: Model, recipe: RecipeText = DEFAULT_RECIPE, backend: BackendName = None, as_json: Json = False
) -> None:
    """What compile would do, without data and without doing the expensive part: layers, sizes, refusals."""
    from qcompiler.compiler import explain
    from qcompiler.recipe import Recipe

    steps = Recipe.parse(recipe)
    source = resolve(model)
    with Reporter() as progress:
        progress("planning", 0, 0)
        report = explain(source.model, steps, backend=backend, example_inputs=source.example_inputs)
    if as_json:
        _print_json(asdict(report))
    else:
        Console().print(show.report_view(report, layers=True))


@app.command()
def tune(
    folder: Folder,
    backend: Annotated[str, typer.Option("--backend", help="Whose kernels.")] = "triton",
    as_json: Json = False,
) -> None:
    """Measure which configurations of its kernels are fastest here, for the layers of a compiled model; keep them.

    Without it kernels take theirs by a rule: nothing is ever tried out at a first call.
    """
    from qcompiler import artifact
    from qcompiler.recipe import build_backend

    with Reporter() as progress:
        answer = build_backend(backend).tune(artifact.load(Path(folder)).program, progress)
    if isinstance(answer, No):
        raise BackendError(str(answer))
    if as_json:
        _print_json({"file": str(answer)})
    else:
        Console().print(f"Kept in {answer}", markup=False)


@app.command()
def plugins(as_json: Json = False) -> None:
    """What is installed: passes, recipes, backends (and why one is not available), broken plugins."""
    from qcompiler.plugins import registry
    from qcompiler.recipe import described

    found = registry()
    facts = show.plugins_facts(found, {name: described(name) for name in found.recipes})
    if as_json:
        _print_json(facts)
    else:
        Console().print(show.plugins_view(facts))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the compiled model goes.")] = Path("build/demo"),
    recipe: RecipeText = DEFAULT_RECIPE,
) -> None:
    """Compile SmolLM2-135M to 4 bits and show it beside its 32-bit original."""
    from qcompiler.demo import run

    _check_out(out)
    Console().print(run(out, recipe))


def _standard_only(backend: str | None) -> Any:
    """The backend that writes ONNX, asked for operators of the standard; InputError for one that writes none."""
    from qcompiler.recipe import build_backend

    chosen: Any = build_backend(backend or "onnxruntime")
    if not hasattr(chosen, "opset_only"):
        raise InputError(f'--opset-only is for the backend "onnxruntime"; "{chosen.name}" writes no ONNX file')
    return replace(chosen, opset_only=True)


cli_formats.add_to(app)


def _capture(model: str) -> Any:
    """The program of a float model."""
    from qcompiler.compiler import capture

    source = resolve(model)
    with Reporter() as progress:
        progress("capturing", 0, 0)
        return capture(source.model, source.example_inputs)


def _runnable(model: str, backend: str | None, progress: Reporter) -> tuple[Callable[[Any], Any], Any]:
    """A function from ids to logits, and the tokenizer: of a compiled folder, or of a float model in PyTorch."""
    from qcompiler.compiler import capture, load, tokenizer_of
    from qcompiler.evaluate import vocabulary_of

    progress(f"loading {model}", 0, 0)
    if is_artifact(model):
        session = load(model, backend)
        vocabulary_of(session.program)
        return session, session.tokenizer
    source = resolve(model)
    program = capture(source.model, source.example_inputs)
    vocabulary_of(program)
    return lambda ids: program(**{program.inputs[0].name: ids})["logits"], tokenizer_of(program)


def _check_artifact(folder: str) -> None:
    if not is_artifact(folder):
        what = "is not a compiled folder: it has no manifest.json" if Path(folder).exists() else "does not exist"
        raise InputError(f'"{folder}" {what}; make one with: qcompiler compile MODEL -o {folder}')


def _check_out(folder: Path) -> None:
    """Complain about the place for the result before the work, not after it."""
    if folder.is_file():
        raise InputError(f'"{folder}" is a file; give the name of a new folder with -o')
    if folder.is_dir() and any(folder.iterdir()) and not is_artifact(str(folder)):
        raise InputError(f'"{folder}" exists and is not a qcompiler artifact; give the name of a new folder with -o')


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f'text file "{path}" does not exist')
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f'text file "{path}" is not UTF-8: {error.reason} at byte {error.start}') from error
    if not content.strip():
        raise InputError(f'text file "{path}" is empty; give a text to predict')
    return content


def _size_mb(folder: Path) -> float:
    from qcompiler.evaluate import size_mb

    return size_mb(folder)


def _typewriter() -> Callable[[int, str], None]:
    """Prints what is new of a growing text; half a character (a byte token) waits for the other half."""
    shown = 0

    def print_new(token: int, text: str) -> None:
        nonlocal shown
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)

    return print_new


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_plain(value), indent=1))


def _plain(value: Any) -> Any:
    """The same with what JSON lacks replaced: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
