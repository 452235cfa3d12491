"""GGUF files made here and by llama.cpp's own quantizer from the same float file, measured by llama.cpp.

    python benchmarks/formats.py --text valid.txt --llama-python PYTHON [--types q4_k_m q3_k_m] [--rounds 5]

Perplexity over windows of 512 tokens from the start of the text; the importance matrix is measured here on the last 32
windows of the same text (never those evaluated) and given to both. Decode speed is of 128 tokens, one by one, in
llama.cpp and, of our files, in plain onnxruntime, the two alternating: measure it on a quiet machine, or leave it out
(--rounds 0). llama.cpp lives in an environment of its own: see peers/README.md. Writes results/formats.json and the
table in docs/formats.md; what is there already is not measured again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import canonical, resumed, write
from cpu import Engine, alternate
from formats_page import write_page

from qcompiler import compile
from qcompiler.formats import gguf_types, gguf_write
from qcompiler.formats.gguf import GgufFile
from qcompiler.passes.kquant import measured
from qcompiler.pipeline import Context
from qcompiler.program import Program
from qcompiler.recipe import build
from qcompiler.source import resolve

LENGTH, CALIBRATION = 512, 32
PEERS = Path(__file__).parent / "peers"


def main() -> None:
    """Measure what is not measured yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path, required=True, help="Python of an environment with llama_cpp")
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q3_k_m"])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="of decoding; 0 measures no speed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args()

    base, tokenizer = canonical(resolve(options.model).model)
    tokens = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    setting = {"text": options.text.name, "windows": options.windows, "length": LENGTH, "calibration": CALIBRATION}
    figures = resumed("formats", setting, options.fresh)
    with tempfile.TemporaryDirectory() as folder:
        pace = Pace(Path(folder), options.llama_python, options.rounds, options.threads)
        bench = Bench(base, Path(folder), options.llama_python, figures.setdefault("files", {}), pace)
        bench.prepare(rows[: options.windows], rows[-CALIBRATION:])
        bench.measure("F32", bench.float_file, 0.0)
        for kind in options.types:
            for weighed in (False, True):
                bench.both(kind.upper(), weighed)
                write("formats", figures)
    write_page()


class Bench:
    """One float model, and what becomes of it."""

    def __init__(self, base: Program, folder: Path, python: Path, files: dict[str, Any], pace: "Pace") -> None:
        self.base, self.folder, self.python, self.files, self.pace = base, folder, python, files, pace
        self.float_file, self.windows = folder / "float.gguf", folder / "windows.jsonl"
        self.matrix = folder / "imatrix.dat"

    def prepare(self, windows: torch.Tensor, calibration: torch.Tensor) -> None:
        """The float file, the windows to evaluate on, and the importance matrix."""
        gguf_write.write(self.base, self.float_file)
        self.windows.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in windows))
        samples = [{"input_ids": row[None]} for row in calibration]
        measured(self.base, samples, "calibration").write(self.matrix)

    def both(self, kind: str, weighed: bool) -> None:
        """A mixture by llama.cpp and by kquant."""
        suffix = ", imatrix" if weighed else ""
        names = {who: f"{kind} {who}{suffix}" for who in ("llama.cpp", "qcompiler")}
        if all(self._done(name) for name in names.values()):
            return
        ours, theirs = self.folder / "ours.gguf", self.folder / "theirs.gguf"
        program, start = self.base.copy(), time.perf_counter()
        build("kquant", {"type": kind.lower(), "imatrix": str(self.matrix) if weighed else ""}).run(program, Context())
        seconds = time.perf_counter() - start
        gguf_write.write(program, ours)
        extra = ["--imatrix", str(self.matrix)] if weighed else []
        report = self._peer("llama_cpp_quantize.py", str(self.float_file), str(theirs), "--type", kind, *extra)
        _same_types(ours, theirs)
        self.measure(names["llama.cpp"], theirs, report["seconds"])
        self.measure(names["qcompiler"], ours, seconds)

    def _done(self, name: str) -> bool:
        return name in self.files and ("decode" in self.files[name] or not self.pace.rounds)

    def measure(self, name: str, path: Path, seconds: float) -> None:
        """Size, bits a weight, llama.cpp's perplexity, and the speed of whatever runs the file."""
        if name not in self.files:
            self.files[name] = self._quality(path, seconds)
        if not self._done(name):
            self.files[name]["decode"] = self.pace.measured(path, ours="llama.cpp" not in name)
        print(name, json.dumps(self.files[name]), flush=True)

    def _quality(self, path: Path, seconds: float) -> dict[str, float]:
        found = self._peer("llama_cpp_perplexity.py", str(path), str(self.windows), "--context", str(LENGTH))
        file = GgufFile.read(path)
        values = sum(torch.Size(t.shape).numel() for t in file.tensors.values())
        return {
            "perplexity": round(found["perplexity"], 4),
            "bits": round(8 * sum(t.nbytes for t in file.tensors.values()) / values, 3),
            "size_mb": round(path.stat().st_size / 1e6, 1),
            "seconds": round(seconds, 1),
        }

    def _peer(self, script: str, *arguments: str) -> dict[str, Any]:
        """The last JSON line that a peer's script prints."""
        command = [str(self.python), str(PEERS / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        if done.returncode:
            raise SystemExit(f"{script} failed: {done.stderr[-500:]}")
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer


class Pace:
    """How fast engines decode a GGUF file, in tokens a second."""

    def __init__(self, folder: Path, python: Path, rounds: int, threads: int) -> None:
        self.folder, self.python, self.rounds, self.threads = folder, python, rounds, threads

    def measured(self, path: Path, ours: bool) -> dict[str, float]:
        """The median of each engine: llama.cpp, and with `ours` onnxruntime over the same codes."""
        engines = {"llama.cpp": Engine("llama", str(self.python), str(path), self.threads)}
        if ours:
            folder = self.folder / f"{path.stem}-onnx"
            compile(path, "stored", backend="onnxruntime").save(folder)
            engines["onnxruntime"] = Engine("ours", sys.executable, str(folder), self.threads)
        samples = alternate(engines, "decode", self.rounds)
        for engine in engines.values():
            engine.close()
        return {name: round(statistics.median(paces), 1) for name, paces in samples.items()}


def _same_types(ours: Path, theirs: Path) -> None:
    """The comparison is one of equal size, tensor by tensor, or none."""
    first, second = GgufFile.read(ours).tensors, GgufFile.read(theirs).tensors
    differ = [f"{n}: {first[n].kind}, llama.cpp {t.kind}" for n, t in second.items() if first[n].kind != t.kind]
    if differ:
        raise SystemExit(f"{len(differ)} tensors have other types than llama.cpp's: {'; '.join(differ[:4])}")
    assert any(t.kind in gguf_types.KINDS for t in first.values())


if __name__ == "__main__":
    main()
