"""Evaluate: perplexity, KL divergence and top-1 agreement on a text; speed, memory and size."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from qcompiler.errors import InputError, QCompilerError
from qcompiler.pipeline import Progress
from qcompiler.program import Program
from qcompiler.sampling import choose
from qcompiler.target import Runner

Run = Callable[[Tensor], Tensor]  # ids int64 [batch, sequence] -> logits [batch, sequence, vocabulary]

BLOCK = 64  # positions compared at a time: what is held in double precision is BLOCK x vocabulary


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text, and how near to a baseline's its predictions are.

    `perplexity` is exp of the mean negative log-likelihood in nats; `kl` the mean KL(baseline || model) in
    nats per predicted token; `top1` the share of tokens whose most likely successor is the same (0 to 1).
    """

    perplexity: float
    kl: float | None = None
    top1: float | None = None
    baseline_perplexity: float | None = None


@dataclass(frozen=True)
class Agreement:
    """How far two programs write the same greedy text from one prompt.

    The first `same` tokens of `asked` are the same. Where they part, `gaps` says by how many logits each program
    preferred its own token to the other's, and `difference` how far their logits are apart at most: of a tie, the gaps
    are no larger than that difference.
    """

    same: int
    asked: int
    gaps: tuple[float, float] = (0.0, 0.0)
    difference: float = 0.0


@dataclass(frozen=True)
class Speed:
    """How fast a program runs: medians over the repeats, in tokens a second and milliseconds a token."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ms_per_token: float


def windows(tokens: Tensor, length: int, count: int | None = None) -> list[Tensor]:
    """The first `count` (default: all) full windows [1, length] of a text's ids [n], not overlapping.

    Raises InputError where the text is shorter than one window, or the numbers make no sense.

    >>> [window.tolist() for window in windows(torch.arange(7), 3)]
    [[[0, 1, 2]], [[3, 4, 5]]]
    """
    if length < 2:
        raise InputError(f"windows of {length} tokens predict nothing; use a length of at least 2")
    if count is not None and count < 1:
        raise InputError(f"{count} windows are none; ask for at least 1")
    found = len(tokens) // length
    if not found:
        raise InputError(
            f"the text has {len(tokens)} tokens, fewer than one window of {length}; give more text or a shorter length"
        )
    return list(tokens[: found * length].view(found, 1, length)[:count])


def perplexity(
    run: Run, tokens: Tensor, length: int = 512, count: int | None = None, progress: Progress | None = None
) -> float:
    """exp of the mean over windows of the mean negative log-likelihood of their `length - 1` predictions.

    >>> round(perplexity(lambda ids: torch.zeros(1, ids.shape[1], 10), torch.arange(8), length=4), 6)
    10.0
    """
    return compare(run, None, tokens, length, count, progress).perplexity


def compare(
    run: Run,
    baseline: Run | None,
    tokens: Tensor,
    length: int = 512,
    count: int | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity of `run` on ids [n], and with a baseline the KL divergence from it and top-1 agreement.

    Raises InputError if their vocabularies differ in size, QCompilerError if predictions are not finite.
    """
    pieces = windows(tokens, length, count)
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for i, window in enumerate(pieces):
            if progress:
                progress("evaluating", i, len(pieces))
            reference = baseline(window)[0, :-1] if baseline else None
            sums += _window_means(run(window)[0, :-1], reference, window[0, 1:])
    if progress:
        progress("evaluating", len(pieces), len(pieces))
    if not bool(torch.isfinite(sums).all()):
        raise QCompilerError("the predictions are not finite; the weights or their quantization are broken")
    nll, kl, top1, baseline_nll = (sums / len(pieces)).tolist()
    return Quality(_exp(nll), kl, top1, _exp(baseline_nll)) if baseline else Quality(_exp(nll))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _window_means(logits: Tensor, reference: Tensor | None, targets: Tensor) -> Tensor:
    """float64 [4]: a window's means of negative log-likelihood, KL, agreement, the baseline's likelihood."""
    if reference is not None and reference.shape != logits.shape:
        raise InputError(
            f"the baseline predicts {reference.shape[-1]} tokens and the model {logits.shape[-1]}; "
            "give a baseline with the same vocabulary"
        )
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), BLOCK):
        rows = slice(start, start + BLOCK)
        sums += _block_sums(logits[rows], None if reference is None else reference[rows], targets[rows])
    return sums / len(targets)


def _block_sums(logits: Tensor, reference: Tensor | None, targets: Tensor) -> Tensor:
    q = logits.double().log_softmax(-1)
    sums = torch.zeros(4, dtype=torch.float64)
    sums[0] = -q.gather(-1, targets[:, None]).sum()
    if reference is not None:
        p = reference.double().log_softmax(-1)
        sums[1] = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
        sums[2] = (logits.argmax(-1) == reference.argmax(-1)).sum()
        sums[3] = -p.gather(-1, targets[:, None]).sum()
    return sums


def speed(runner: Runner, vocabulary: int, prompt_tokens: int = 512, new_tokens: int = 128, repeats: int = 3) -> Speed:
    """Time prefill of [1, prompt_tokens] (the last position's logits only) and greedy decoding, one by one.

    A short unmeasured round comes first. Raises BackendError if the program has no cache.
    """
    if min(prompt_tokens, new_tokens, repeats) < 1:
        raise InputError("prompt tokens, new tokens and repeats must each be at least 1")
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=random)
    _seconds(runner, prompt, min(new_tokens, 4))
    rounds = [_seconds(runner, prompt, new_tokens) for _ in range(repeats)]
    prefill, decode = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return Speed(prompt_tokens / prefill, new_tokens / decode, 1000 * decode / new_tokens)


def _seconds(runner: Runner, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """How long prefill and decoding take."""
    decoder = runner.decoder(1, prompt.shape[1] + new_tokens)
    start = time.perf_counter()
    logits = decoder.step(prompt)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        logits = decoder.step(choose(logits))
    return middle - start, time.perf_counter() - middle


def agreement(a: Runner, b: Runner, ids: Tensor, new_tokens: int = 64) -> Agreement:
    """Continue ids [1, length] greedily with both programs until they part, or for `new_tokens`.

    Raises BackendError if a program has no cache.
    """
    decoders = [runner.decoder(1, ids.shape[1] + new_tokens) for runner in (a, b)]
    step = ids
    for done in range(new_tokens):
        mine, other = (decoder.step(step)[0].float() for decoder in decoders)
        step, different = choose(mine[None]), choose(other[None])
        if not torch.equal(step, different):
            i, j = int(step), int(different)
            gaps = float(mine[i] - mine[j]), float(other[j] - other[i])
            return Agreement(done, new_tokens, gaps, float((mine - other).abs().max()))
    return Agreement(new_tokens, new_tokens)


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes); the present one if no more is known."""
    try:
        # getrusage would also count what the parent held when it started this process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(kilobytes) * 1024 / 1e6
    except (OSError, StopIteration):
        memory = psutil.Process().memory_info()
        return float(getattr(memory, "peak_wset", memory.rss)) / 1e6


def size_mb(path: Path) -> float:
    """Size on disk of a file, or of all files in a folder, in MB (10^6 bytes)."""
    files: Iterator[Path] = path.rglob("*") if path.is_dir() else iter([path])
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def vocabulary_of(program: Program) -> int:
    """The last size of the output "logits"; InputError if the program has no such output."""
    if "logits" not in program.outputs:
        raise InputError(f"this takes a language model; the outputs of this one are {list(program.outputs)}")
    values: Any = program.output_node.args[0]
    return int(values[program.outputs.index("logits")].meta["type"].shape[-1])


def encode(tokenizer: Any, text: str) -> Tensor:
    """The ids int64 [n] of a text, without special tokens; InputError if there is no tokenizer."""
    if tokenizer is None:
        raise InputError("the model has no tokenizer to turn text into tokens; put its files beside the model")
    # verbose: it would warn of a text longer than the model's context, which is cut into windows anyway.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
