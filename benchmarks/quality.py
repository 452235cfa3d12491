"""Quality of the quantized SmolLM2-135M: perplexity by method, bits and group size.

    python benchmarks/quality.py --text valid.txt [--windows 16] [--peer-python .peers/bin/python]

Writes results/quality.json. Windows of 512 tokens, from the start of the text; calibration from the model itself,
and for the comparison with gptqmodel the last windows of the same text (never those evaluated), given to both.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import canonical, write

from qcompiler import data, evaluate
from qcompiler.compiler import calibration_writer
from qcompiler.data import Calibration
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.report import Meter
from qcompiler.source import demo_model, resolve

LENGTH = 512
SELF = {  # name: (passes, perplexity bar as a multiple of fp32, or None)
    "rtn 8-bit g64": ("rtn{scheme=int8:g64:sym}", 1.005),
    "rtn 4-bit g64 asym": ("rtn{scheme=int4:g64:asym}", None),
    "gptq 4-bit g64 asym": ("gptq{scheme=int4:g64:asym}", 1.13),
    "rtn 4-bit g128 asym": ("rtn{scheme=int4:g128:asym}", None),
    "gptq 4-bit g128 asym": ("gptq{scheme=int4:g128:asym}", 1.16),
    "rtn 3-bit g64 asym": ("rtn{scheme=int3:g64:asym}", None),
    "gptq 3-bit g64 asym": ("gptq{scheme=int3:g64:asym}", None),
    "recipe gptq-w4a16": ("gptq{scheme=int4:g64:asym}, rtn{scheme=int8:g128:sym include=@head}", None),
}
PEER = {"4-bit g64 asym": (4, 64, False), "4-bit g128 asym": (4, 128, False), "3-bit g64 asym": (3, 64, False)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with gptqmodel")
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()

    base, tokenizer = canonical(resolve(options.model).model)
    text = options.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    fp32 = _perplexity(base, tokens, options.windows)
    figures: dict[str, Any] = {"text": options.text.name, "windows": options.windows, "length": LENGTH, "fp32": fp32}
    print(f"fp32 {fp32:.3f}", flush=True)
    if options.peer_python:
        figures["against gptqmodel"] = _against_peer(base, tokens, options, fp32)
        write("quality", figures)
    calibration = Calibration()
    with Meter() as meter:
        written = data.load(calibration, calibration_writer(base, calibration))
    figures["writing calibration text"] = {"seconds": round(meter.seconds, 1), "calibration": calibration.describe()}
    figures["self"] = {}
    for name, (passes, bar) in SELF.items():
        if options.only in name:
            figures["self"][name] = _measure(base, passes, written, tokens, options.windows, fp32, bar)
            print(name, json.dumps(figures["self"][name]), flush=True)
            write("quality", figures)
    print("written to", write("quality", figures))


def _measure(
    base: Program, passes: str, samples: Any, tokens: torch.Tensor, windows: int, fp32: float, bar: float | None
) -> dict[str, Any]:
    """Quantize a copy and measure it."""
    program = base.copy()
    runner = Runner(Context(samples=samples), data.check_samples(program))
    before = Meter()._process.memory_info().rss / 1e6
    with Meter() as meter:
        runner.run(program, Recipe.parse(passes).passes)
    found = _perplexity(program, tokens, windows)
    figures = {
        "perplexity": round(found, 3),
        "ratio": round(found / fp32, 4),
        "seconds": round(meter.seconds, 1),
        "peak_above_loaded_mb": round(meter.peak_rss_mb - before),
    }
    return figures | ({"bar": bar, "met": found / fp32 <= bar} if bar else {})


def _perplexity(program: Program, tokens: torch.Tensor, windows: int) -> float:
    run = build_reference(program)
    return evaluate.perplexity(run, tokens, LENGTH, windows)


def build_reference(program: Program) -> Any:
    """The program's logits by the reference backend."""
    from qcompiler.plugins import lookup

    runner = lookup("backends", "reference")().lower(program)
    return lambda ids: runner({"input_ids": ids})["logits"]


def _against_peer(base: Program, tokens: torch.Tensor, options: argparse.Namespace, fp32: float) -> dict[str, Any]:
    """gptqmodel and ours on the same calibration text, bits and groups; perplexity by the same code."""
    from safetensors.torch import load_file

    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[-32:]
    samples = data.load(Calibration(list(rows), 32, LENGTH), base)
    script = Path(__file__).parent / "peers" / "gptqmodel_quantize.py"
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_float(model)
        lines = [json.dumps({"input_ids": row.tolist()}) for row in rows]
        (Path(folder) / "calibration.jsonl").write_text("\n".join(lines))
        for name, (bits, group, symmetric) in PEER.items():
            out = Path(folder) / "dequantized.safetensors"
            command = [
                *(str(options.peer_python), str(script), str(model), str(out)),
                *("--bits", str(bits), "--group-size", str(group), "--sym" if symmetric else "--asym"),
                *("--calibration", str(Path(folder) / "calibration.jsonl")),
            ]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
            if answer.returncode:
                figures[name] = {"gptqmodel": {"refused": answer.stderr.strip().splitlines()[-1:]}}
                continue
            peer = json.loads(answer.stdout.strip().splitlines()[-1])
            theirs = base.copy()
            theirs.tensors |= {k: v for k, v in load_file(out).items() if k in theirs.tensors}
            found = _perplexity(theirs, tokens, options.windows)
            kind = "sym" if symmetric else "asym"
            figures[name] = {
                "gptqmodel": peer | {"perplexity": round(found, 3), "ratio": round(found / fp32, 4)},
                "qcompiler": _measure(
                    base, f"gptq{{scheme=int{bits}:g{group}:{kind}}}", samples, tokens, options.windows, fp32, None
                ),
            }
            print(name, json.dumps(figures[name]), flush=True)
    return figures


def save_float(folder: Path) -> None:
    """The demo model as an ordinary folder that other tools load."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo_model()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


if __name__ == "__main__":
    main()
