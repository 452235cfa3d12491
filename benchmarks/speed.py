"""Speed of the 4-bit SmolLM2-135M on ONNX Runtime against llama.cpp, alternating in one run.

    python benchmarks/speed.py ARTIFACT ... --peer-python .peers/bin/python --peer-model Q4_0.gguf [--rounds 7]

All use the same number of threads; prefill is 512 tokens with the logits of the last, decode 128 single tokens.
While one measures, the others wait. Writes results/speed.json: medians, and the median of the ratios by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import write

import qcompiler
from qcompiler.evaluate import vocabulary_of
from qcompiler.sampling import choose

PROMPT, NEW = 512, 128


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-model", type=Path)
    parser.add_argument("--engine", default="llama_cpp", choices=["llama_cpp", "xllamacpp"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    sessions = [qcompiler.load(folder) for folder in options.artifacts]
    names = [session.report.recipe for session in sessions]
    peer = _peer(options) if options.peer_python else None
    ids = torch.randint(0, vocabulary_of(sessions[0].program), (1, PROMPT), generator=torch.Generator().manual_seed(0))
    figures: dict[str, Any] = {"prompt_tokens": PROMPT, "new_tokens": NEW, "recipes": {name: {} for name in names}}
    for what, measure in {"prefill": partial(_prefill, ids=ids), "decode": partial(_decode, ids=ids)}.items():
        runs: dict[str, Callable[[], float]] = {n: partial(measure, s) for n, s in zip(names, sessions, strict=True)}
        if peer:
            runs["llama.cpp"] = partial(_ask, peer, what)
        samples = _alternate(runs, options.rounds)
        for name in names:
            figures["recipes"][name][f"{what}_tokens_per_s"] = _spread(samples[name])
            if peer:
                ratios = [a / b for a, b in zip(samples[name], samples["llama.cpp"], strict=True)]
                figures["recipes"][name][f"{what}_vs_llama_cpp"] = round(statistics.median(ratios), 3)
        if peer:
            figures.setdefault("llama.cpp", {"engine": options.engine, "model": options.peer_model.name})
            figures["llama.cpp"][f"{what}_tokens_per_s"] = _spread(samples["llama.cpp"])
    if peer:
        peer.communicate("quit\n", timeout=60)
    print(json.dumps(figures, indent=1))
    print("written to", write("speed" if options.engine == "llama_cpp" else f"speed_{options.engine}", figures))


def _alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every run once unmeasured, then one after the other, `rounds` times."""
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
    return samples


def _prefill(session: Any, ids: torch.Tensor) -> float:
    decoder = session.runner.decoder(1, PROMPT + 1)
    start = time.perf_counter()
    decoder.step(ids)
    return PROMPT / (time.perf_counter() - start)


def _decode(session: Any, ids: torch.Tensor) -> float:
    decoder = session.runner.decoder(1, NEW + 17)
    step = choose(decoder.step(ids[:, :16]))
    start = time.perf_counter()
    for _ in range(NEW):
        step = choose(decoder.step(step))
    return NEW / (time.perf_counter() - start)


def _spread(samples: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(samples), 1),
        "best": round(max(samples), 1),
        "worst": round(min(samples), 1),
    }


def _peer(options: argparse.Namespace) -> "subprocess.Popen[str]":
    script = Path(__file__).parent / "peers" / "llama_cpp_bench.py"
    threads = str(min(2, os.cpu_count() or 1))
    command = [options.peer_python, script, options.peer_model, "--serve", "--threads", threads]
    command += ["--engine", options.engine, "--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW)]
    peer = subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert peer.stdout is not None
    json.loads(peer.stdout.readline())  # its answer to being loaded
    return peer


def _ask(peer: "subprocess.Popen[str]", command: str) -> float:
    """Tokens a second that the peer reaches at a command."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(command + "\n")
    peer.stdin.flush()
    return float(json.loads(peer.stdout.readline())["tokens_per_s"])


if __name__ == "__main__":
    main()
