"""Capture a tiny random model of every causal-LM architecture that transformers knows; write docs/architectures.md.

    python benchmarks/architectures.py                  all (finished ones are kept in build/ and not run again)
    python benchmarks/architectures.py --sample 20      every n-th
    python benchmarks/architectures.py --only gemma2    these alone, run anew

Each runs in a process of its own. After the capture, which verifies itself, the program is compared with the model's
eager logits once more, at yet another size and with left padding.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import VARIANTS, features, tiny_model

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "architectures"
PAGE = ROOT / "docs" / "architectures.md"
LIMIT = 120  # seconds of processor time for one architecture
PATIENCE = 5  # and this many times as many by the clock, on a machine that others use too


@dataclass
class Row:
    """What happened to one architecture."""

    model_type: str
    status: str  # captured, refused, not built, timed out
    way: str = ""
    error: float = 0.0
    features: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    sites: list[int] = field(default_factory=list)  # to permute, to scale, to rotate, to flip
    site_error: float = 0.0  # the largest change when all are transformed


def check(model_type: str) -> Row:
    """Build, capture and compare one architecture."""
    from qcompiler.errors import QCompilerError
    from qcompiler.frontends.huggingface import capture

    try:
        model = _build(model_type)
    except Exception as error:  # noqa: BLE001  any error of a model's own code
        return Row(model_type, "not built", reason=_short(error))
    try:
        program = capture(model)
        error = _compare(program, model)
    except QCompilerError as refused:
        return Row(model_type, "refused", features=features(model), reason=str(refused))
    except Exception as broken:  # noqa: BLE001  a bug of ours: the table must show it
        traceback.print_exc()
        return Row(model_type, "failed", features=features(model), reason=_short(broken))
    status = "captured" if error <= 1e-4 else "wrong"
    row = Row(model_type, status, program.info["way"], max(error, program.info["error"]), features(model))
    try:
        row.sites, row.site_error = _sites(program)
        row.status = row.status if row.site_error <= 1e-9 else "wrong"
    except Exception as broken:  # noqa: BLE001  a bug of ours: the table must show it
        traceback.print_exc()
        row.status, row.reason = "failed", f"sites: {_short(broken)}"
    return row


def _sites(program: Any) -> tuple[list[int], float]:
    """How many symmetry sites there are of each kind, and what transforming them all changes."""
    from qcompiler import data
    from qcompiler.pipeline import Context, Runner
    from qcompiler.recipe import build
    from qcompiler.sites import Kind
    from qcompiler.testing import check_sites

    Runner(Context(), data.check_samples(program)).run(program, [build("canonicalize", {})])
    found = [check_sites(program, kind) for kind in Kind]
    return [count for count, _ in found], max(error for _, error in found)


def _build(model_type: str) -> Any:
    """The tiny model with all the features that its code accepts."""
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            model = tiny_model(model_type, variant)
            with torch.no_grad():
                logits = model(input_ids=torch.arange(2, 26).view(1, -1), use_cache=False).logits
            if not logits.isfinite().all():
                raise ValueError("the eager logits are not finite")
            return model
        except Exception as error:  # noqa: BLE001  any error of a model's own code
            first = first or error
    assert first is not None
    raise first


def _compare(program: Any, model: Any) -> float:
    """max |difference| / max |logit| at the real tokens of 4 left-padded sequences of 33."""
    generator = torch.Generator().manual_seed(33)
    ids = torch.randint(3, 99, (4, 33), generator=generator)
    real = torch.arange(33)[None] >= torch.tensor([[0], [1], [9], [20]])
    inputs = {"input_ids": ids}
    if "attention_mask" in {spec.name for spec in program.inputs}:
        inputs["attention_mask"] = real.long()
    else:
        real = torch.ones_like(real)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[real]
    got = program(**inputs)["logits"][real]
    return float((got - expected).abs().max() / expected.abs().max())


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def _work(model_type: str) -> None:
    """In a child process: check, and leave the row in the cache."""
    torch.set_num_threads(1)
    used = resource.getrusage(resource.RUSAGE_SELF)
    already = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (already + LIMIT, already + LIMIT + 5))
    start = time.process_time()
    with (CACHE / f"{model_type}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        row = check(model_type)
    row.seconds = round(time.process_time() - start, 1)
    _store(row)


def _store(row: Row) -> None:
    (CACHE / f"{row.model_type}.json").write_text(json.dumps(asdict(row)))


def _stored(model_type: str) -> Row | None:
    path = CACHE / f"{model_type}.json"
    return Row(**json.loads(path.read_text())) if path.exists() else None


def run(model_types: list[str], jobs: int) -> None:
    """Check all of them, `jobs` at a time, each with its time limit; one line each."""
    import transformers.models.llama.modeling_llama  # noqa: F401  the children inherit what is imported

    import qcompiler.frontends.huggingface  # noqa: F401

    context = multiprocessing.get_context("fork")
    waiting, running = list(model_types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            process = context.Process(target=_work, args=(name,))
            process.start()
            running[name] = (process, time.perf_counter())
        time.sleep(0.1)
        for name, (process, start) in list(running.items()):
            late = time.perf_counter() - start > LIMIT * PATIENCE
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            if _stored(name) is None:
                timed_out = late or process.exitcode == -signal.SIGXCPU
                reason = f"took longer than {LIMIT} s" if timed_out else f"ended with code {process.exitcode}"
                _store(Row(name, "timed out" if timed_out else "failed", reason=reason, seconds=LIMIT))
            del running[name]
            row = _stored(name)
            assert row is not None
            print(
                f"{row.model_type:24} {row.status:10} {row.seconds:6.1f} s  {row.way or row.reason[:200]}", flush=True
            )


def page(rows: list[Row]) -> str:
    """docs/architectures.md."""
    import transformers

    captured = [row for row in rows if row.status == "captured"]
    built = [row for row in rows if row.status != "not built"]
    lines = [
        "# Architectures",
        "",
        "Written by `make architectures` (benchmarks/architectures.py); do not edit.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}.",
        f"Of {len(rows)} causal-LM architectures, {len(built)} could be built as tiny random models.",
        f"{len(captured)} are captured and match eager logits to 1e-4 relative,",
        "at other batch and sequence sizes than traced and with padding on either side.",
        "",
        "*Sites*: how many groups of channels may be permuted / scaled / rotated / flipped together",
        "(qcompiler/sites.py; rows measured before signs were added have three numbers).",
        "Transforming all of them at random changes the logits, in double precision, by the last column, relative.",
        "",
        "| architecture | result | way of capture | what the tested model has | largest error | sites | change |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error, change = (f"{e:.0e}" if row.status == "captured" else "" for e in (row.error, row.site_error))
        sites = " / ".join(map(str, row.sites))
        cells = (row.model_type, row.status, row.way, ", ".join(row.features), error, sites, change)
        lines.append(f"| {' | '.join(cells)} |")
    others = [row for row in rows if row.status != "captured"]
    if others:
        lines += ["", "## Why not", ""]
        lines += [f"- **{row.model_type}** ({row.status}): {row.reason}" for row in others]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parse the command line, run, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sample", type=int, help="check this many, evenly spread, and write no page")
    parser.add_argument("--only", nargs="+", help="check these alone, and write no page")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget the results in build/")
    options = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    CACHE.mkdir(parents=True, exist_ok=True)
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if options.sample:
        names = names[:: max(1, len(names) // options.sample)][: options.sample]
    names = options.only or names
    again = options.fresh or options.only
    for name in names if again else ():
        (CACHE / f"{name}.json").unlink(missing_ok=True)
    run([name for name in names if _stored(name) is None], options.jobs)
    rows = [row for name in names if (row := _stored(name)) is not None]
    print(f"{sum(row.status == 'captured' for row in rows)} of {len(rows)} captured")
    if not options.sample and not options.only:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows))
    return int(any(row.status in ("failed", "wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
