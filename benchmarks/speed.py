"""Speed of the 4-bit SmolLM2-135M on ONNX Runtime against llama.cpp, alternating in one run.

    python benchmarks/speed.py ARTIFACT --peer-python .peers/bin/python --peer-model Q4_0.gguf [--rounds 7]

Both sides use the same number of threads; prefill is 512 tokens with the logits of the last, decode 128 single
tokens. While one side measures, the other waits. Writes results/speed.json: medians, and the median of the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
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
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-model", type=Path)
    parser.add_argument("--engine", default="llama_cpp", choices=["llama_cpp", "xllamacpp"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    peer = _peer(options) if options.peer_python else None
    start = time.perf_counter()
    session = qcompiler.load(options.artifact)
    figures: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 3), "backend": session.report.backend}
    ids = torch.randint(0, vocabulary_of(session.program), (1, PROMPT), generator=torch.Generator().manual_seed(0))
    measures = {"prefill": lambda: _prefill(session, ids), "decode": lambda: _decode(session, ids)}
    for measure in measures.values():
        measure()
    for what, measure in measures.items():
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(measure())
            if peer:
                theirs.append(_ask(peer, what)["tokens_per_s"])
        figures[f"{what}_tokens_per_s"] = _spread(ours)
        if peer:
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            figures[f"llama_cpp_{what}_tokens_per_s"] = _spread(theirs)
            figures[f"{what}_vs_llama_cpp"] = round(ratio, 3)
    if peer:
        peer.communicate("quit\n", timeout=60)
        figures["peer"] = {"engine": options.engine, "model": options.peer_model.name}
    print(json.dumps(figures, indent=1))
    print("written to", write("speed", figures))


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
    for what in ("prefill", "decode"):
        _ask(peer, what)
    return peer


def _ask(peer: "subprocess.Popen[str]", command: str) -> dict[str, Any]:
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(command + "\n")
    peer.stdin.flush()
    answer: dict[str, Any] = json.loads(peer.stdout.readline())
    return answer


if __name__ == "__main__":
    main()
