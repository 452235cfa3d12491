"""Bench: measure an artifact in a process of its own, so that load time and peak memory are honest."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import QCompilerError
from qcompiler.evaluate import encode, peak_rss_mb, perplexity, size_mb, speed, vocabulary_of
from qcompiler.pipeline import Progress
from qcompiler.session import Session

COMMAND = (sys.executable, "-m", "qcompiler", "bench-child")


@dataclass(frozen=True)
class Job:
    """What to measure of an artifact; with `text` its perplexity too, with `prompt` a completion."""

    folder: str
    backend: str | None = None
    prompt_tokens: int = 512
    new_tokens: int = 128
    repeats: int = 3
    text: str = ""
    length: int = 512
    prompt: str = ""
    completion_tokens: int = 40


def measure(job: Job, load: Callable[[str, str | None], Session], progress: Progress | None = None) -> dict[str, Any]:
    """Do a job in this process, which should be a fresh one: peak memory is that of the whole process."""
    say = progress or (lambda what, done, total: None)
    say("loading", 0, 0)
    start = time.perf_counter()
    session = load(job.folder, job.backend)
    load_s = time.perf_counter() - start
    say("timing", 0, 0)
    vocabulary = vocabulary_of(session.program)
    pace = speed(session.runner, vocabulary, job.prompt_tokens, job.new_tokens, job.repeats)
    found: dict[str, Any] = asdict(pace)
    # Memory is read before the text: the logits of whole windows would outweigh the model.
    found |= {"load_s": load_s, "peak_rss_mb": peak_rss_mb(), "size_mb": size_mb(Path(job.folder))}
    if job.prompt:
        found["completion"] = session.generate(job.prompt, max_new_tokens=job.completion_tokens)
    if job.text:
        found["perplexity"] = perplexity(session, encode(session.tokenizer, job.text), job.length, None, say)
    return found


def measure_apart(job: Job, command: Sequence[str] = COMMAND) -> dict[str, Any]:
    """Do a job in a fresh process; its progress goes to this one's stderr.

    Raises QCompilerError with what went wrong in that process.
    """
    done = subprocess.run(command, input=json.dumps(asdict(job)), stdout=subprocess.PIPE, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise QCompilerError(f'measuring "{job.folder}" ended with exit status {done.returncode}') from None
    if "error" in found:
        raise QCompilerError(found["error"])
    return found
