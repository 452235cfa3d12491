"""NF4 here and in bitsandbytes: the perplexity of one model, its layers quantized by both, on the same text.

    python benchmarks/nf4.py --text valid.txt [--windows 16] [--model FOLDER]

transformers loads the float model and lets bitsandbytes quantize it; qcompiler compiles the same folder. On CPUs with
bfloat16 instructions bitsandbytes multiplies in bfloat16, scales rounded too: that is measured beside its own
arithmetic in float32, to which ours is compared. Writes results/nf4.json and the lines in docs/formats.md.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write
from formats_page import write_page
from quality import LENGTH, save_float

from qcompiler import compile, evaluate

STEPS = "canonicalize, nf4{{double={double}}}, fuse, pack"
BOUND = 1e-6  # how far ours may be from theirs, relatively


def main() -> None:
    """Measure both, with and without quantized scales."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--model", type=Path, help="a folder with a float32 model; without it the demo's")
    options = parser.parse_args()
    figures: dict[str, Any] = {"text": options.text.name, "windows": options.windows, "length": LENGTH, "bound": BOUND}
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary)
        if not options.model:
            save_float(folder)
        found = figures["perplexity"] = {}
        for name, double in (("float32", False), ("8 bits", True)):
            found[name] = measured(folder, double, text, options.windows)
            print(name, found[name], flush=True)
            write("nf4", figures)
    write_page()


def measured(folder: Path, double: bool, text: str, windows: int) -> dict[str, Any]:
    """Perplexities of ours and theirs, and how far apart they are."""
    session = compile(folder, STEPS.format(double=str(double).lower()), backend="reference")
    tokens = evaluate.encode(session.tokenizer, text)
    ours = evaluate.perplexity(session, tokens, LENGTH, windows)
    theirs = {
        exact: evaluate.perplexity(peer(folder, double, exact), tokens, LENGTH, windows) for exact in (True, False)
    }
    difference = abs(ours / theirs[True] - 1)
    return {
        "qcompiler": ours,
        "bitsandbytes": theirs[True],
        "bitsandbytes in its own kernel": theirs[False],
        "difference": difference,
        "met": difference <= BOUND,
    }


def peer(folder: Path, double: bool, exact: bool) -> evaluate.Run:
    """The model as transformers and bitsandbytes quantize it; `exact`: multiplied in float32 on any CPU."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32).eval()
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu &= not exact
    return lambda ids: model(input_ids=ids).logits


if __name__ == "__main__":
    main()
