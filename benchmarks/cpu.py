"""Decoders on a CPU against the engines that people use, alternating in one run; writes results/cpu.json.

    python benchmarks/cpu.py --ours NAME=FOLDER ... [--llama PYTHON=Q4_0.gguf] [--xllama PYTHON=Q4_0.gguf]
        [--genai PYTHON=FOLDER] [--openvino PYTHON=FOLDER] [--torchao PYTHON=HF_FOLDER] [--rounds 7] [--text FILE]

All use two threads. Prefill is 512 tokens with the logits of the last, decode 128 single tokens; while one measures,
the others wait. Every engine lives in processes of its own, a new one each round, ours in plain onnxruntime
(peers/onnxruntime_bench.py), so that memory is comparable. Ratios are medians of the ratios by round. peers/README.md
says how the environments are made.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write
from cpu_page import write_page

PEERS = Path(__file__).parent / "peers"
SCRIPTS = {
    "ours": ("onnxruntime_bench.py",),
    "llama": ("llama_cpp_bench.py", "--engine", "llama_cpp"),
    "xllama": ("llama_cpp_bench.py", "--engine", "xllamacpp"),
    "genai": ("genai_bench.py",),
    "openvino": ("openvino_bench.py",),
    "torchao": ("torchao_bench.py",),
}
SHOWN = {
    "llama": "llama.cpp (built here)",
    "xllama": "llama.cpp (xllamacpp)",
    "genai": "onnxruntime-genai",
    "openvino": "OpenVINO",
    "torchao": "PyTorch with torchao",
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", required=True, metavar="NAME=FOLDER")
    for kind, shown in SHOWN.items():
        parser.add_argument(f"--{kind}", metavar="PYTHON=MODEL", help=shown)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long", action="store_true", help="also decode behind 2048 positions (ours only)")
    parser.add_argument("--text", type=Path, help="also perplexity on this text, ours and --llama's")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--name", default="cpu", help="of the file in results/")
    options = parser.parse_args()

    ours = dict(pair.split("=", 1) for pair in options.ours)
    engines = {name: Engine("ours", sys.executable, folder, options.threads) for name, folder in ours.items()}
    for kind, shown in SHOWN.items():
        if given := getattr(options, kind):
            engines[shown] = Engine(kind, *given.split("=", 1), options.threads)
    figures: dict[str, Any] = {"rounds": options.rounds, "engines": {name: {} for name in engines}}
    if options.text:  # first: what is wrong with a folder comes to light here
        figures |= {"text": options.text.name, "windows": options.windows}
        for name, found in perplexities(options, ours).items():
            figures["engines"][name] |= {what: round(value, 3) for what, value in found.items()}
    samples: dict[str, dict[str, list[float]]] = {}
    for what in ("prefill", "decode", *(("long",) if options.long else ())):
        asked = {name: engine for name, engine in engines.items() if what != "long" or name in ours}
        samples[what] = alternate(asked, what, options.rounds)
        for name, found in samples[what].items():
            figures["engines"][name][f"{what}_tokens_per_s"] = spread(found)
    for name, engine in engines.items():
        figures["engines"][name] |= {"load_s": round(engine.load_s, 2), "peak_rss_mb": engine.peak}
        if engine.long_peak:
            figures["engines"][name]["long_peak_rss_mb"] = engine.long_peak
        engine.close()
    figures |= {"against": {name: against(name, samples, figures["engines"], list(ours)) for name in ours}}
    speed = bandwidth()
    figures["bandwidth_gb_s"] = round(speed / 1e9, 1)
    for name, folder in ours.items():
        read = (Path(folder) / "model.onnx.data").stat().st_size  # all of it once a token: the embedding is the head
        pace = figures["engines"][name]["decode_tokens_per_s"]["median"]
        figures["engines"][name]["mb_a_token"] = round(read / 1e6, 1)
        figures["against"][name]["bandwidth_fraction"] = round(read * pace / speed, 3)
    figures |= next(iter(figures["against"].values()))  # the first of ours, under the keys that people look for
    print(json.dumps(figures, indent=1))
    print("written to", write(options.name, figures))
    write_page()


class Engine:
    """A peer script that waits for commands."""

    def __init__(self, kind: str, python: str, model: str, threads: int) -> None:
        script, *rest = SCRIPTS[kind]
        self.kind, self.command = kind, [python, str(PEERS / script), model, *rest, "--threads", str(threads)]
        self.load_s, self.peak, self.long_peak = 0.0, 0.0, 0.0
        self.start()

    def start(self) -> None:
        """A process of its own, waiting for commands."""
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.load_s = float(self._answer()["load_s"])

    def renew(self, what: str) -> None:
        """Another process, warm: where the memory of one happens to lie makes some per cent."""
        if self.kind != "torchao":  # it compiles for a minute first
            self.close()
            self.start()
        self.ask(what)

    def ask(self, command: str) -> float:
        """Tokens a second."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        found = self._answer()
        if command == "long":
            self.long_peak = max(self.long_peak, found["peak_rss_mb"])
        else:
            self.peak = max(self.peak, found["peak_rss_mb"])
        return float(found["tokens_per_s"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a peer ended: {self.process.args}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Let it end."""
        self.process.communicate("quit\n", timeout=60)


def alternate(engines: dict[str, Engine], what: str, rounds: int) -> dict[str, list[float]]:
    """One engine after the other, `rounds` times, each in a new process that did the same once, unmeasured."""
    samples: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(rounds):
        # In both directions in turn: who follows whom must not matter.
        for name, engine in list(engines.items())[:: 1 if i % 2 == 0 else -1]:
            engine.renew(what)
            samples[name].append(engine.ask(what))
    return samples


def against(
    mine: str, samples: dict[str, dict[str, list[float]]], engines: dict[str, Any], ours: Sequence[str]
) -> dict[str, float]:
    """How one of ours compares with the others: the faster llama.cpp, and every other engine."""
    found: dict[str, float] = {}
    for what in ("decode", "prefill"):
        paces = samples[what]
        llamas = [SHOWN[kind] for kind in ("llama", "xllama") if SHOWN[kind] in paces]
        if llamas:
            faster = max(llamas, key=lambda name: statistics.median(paces[name]))
            found[f"{what}_vs_llama_cpp"] = ratio(paces[mine], paces[faster])
            peak = engines[mine]["peak_rss_mb"] / engines[faster]["peak_rss_mb"]
            found["peak_memory_vs_llama_cpp"] = round(peak, 3)
        for kind in ("genai", "openvino", "torchao"):
            if SHOWN[kind] in paces:
                found[f"{what}_vs_{kind}"] = ratio(paces[mine], paces[SHOWN[kind]])
    if "long" in samples and mine != ours[0]:
        found[f"decode_at_2048_vs_{ours[0]}"] = ratio(samples["long"][mine], samples["long"][ours[0]])
    return found


def bandwidth() -> float:
    """Bytes a second that two threads read from memory: the best of ten passes over 512 MB."""
    import torch

    block = torch.ones(2**27)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / min(times)


def perplexities(options: argparse.Namespace, ours: dict[str, str]) -> dict[str, dict[str, float]]:
    """Of our folders by our session, of llama.cpp's file by llama.cpp, over the same windows of 512 tokens.

    Where a folder has a form that reads prompts: also of the second halves of the windows, behind the first ones read
    by either form.
    """
    import qcompiler
    from qcompiler.evaluate import encode, perplexity

    sessions = {name: qcompiler.load(folder) for name, folder in ours.items()}
    tokens = encode(next(iter(sessions.values())).tokenizer, options.text.read_text(encoding="utf-8"))
    rows = tokens[: 512 * options.windows].view(-1, 512)
    found = {name: {"perplexity": perplexity(s, tokens, 512, options.windows)} for name, s in sessions.items()}
    for name in [name for name, folder in ours.items() if Path(folder, "prompt.0.onnx").exists()]:
        found[name]["behind_integer_prompt"] = behind_prompts(sessions[name].runner, rows)
        sessions[name].runner.reader = None
        found[name]["behind_prompt"] = behind_prompts(sessions[name].runner, rows)
    if options.llama:
        python, model = options.llama.split("=", 1)
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder, "windows.jsonl")
            lines.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
            command = [python, str(PEERS / "llama_cpp_perplexity.py"), model, str(lines)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[SHOWN["llama"]] = {"perplexity": json.loads(done.stdout)["perplexity"]}
    return found


def behind_prompts(runner: Any, rows: Any) -> float:
    """Perplexity of the second half of each row [windows, tokens], token by token behind the first half."""
    import torch

    losses, half = [], rows.shape[1] // 2
    for row in rows:
        decoder = runner.decoder(1, len(row))
        logits = decoder.step(row[None, :half])
        for token in row[half:]:
            losses.append(torch.nn.functional.cross_entropy(logits, token[None]))
            logits = decoder.step(token.view(1, 1))
    return float(torch.stack(losses).mean().exp())


def ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios by round."""
    return round(statistics.median(a / b for a, b in zip(mine, others, strict=True)), 3)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, best and worst."""
    found = {"median": statistics.median(samples), "best": max(samples), "worst": min(samples)}
    return {name: round(value, 1) for name, value in found.items()}


if __name__ == "__main__":
    main()
