"""Does one artifact write the same text on ONNX Runtime and on PyTorch?

    python benchmarks/agreement.py ARTIFACT [--new-tokens 64]

Greedy text for 8 prompts, on the reference backend, on ONNX Runtime computing in float, and on ONNX Runtime as it
ships (8-bit activations inside the 4-bit products). Where two texts part, the gap between the two tokens' logits is
written beside the difference of the logits: a tie, if the gap is the smaller. Writes results/agreement.json.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import write

import qcompiler
from qcompiler.backends.onnxruntime import OnnxRuntime
from qcompiler.evaluate import agreement

PROMPTS = (
    "The largest planet in our solar system is",
    "Once upon a time, in a village by the sea,",
    "To make a good cup of tea, first",
    "def fibonacci(n):",
    "The difference between a virus and a bacterium is",
    "Dear Sir or Madam,",
    "In 1905, Albert Einstein",
    "Three rules for a happy life:",
)
PATHS: dict[str, Any] = {"float products": OnnxRuntime(accuracy_level=0), "8-bit products": None}


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    reference = qcompiler.load(options.artifact, "reference")
    figures: dict[str, Any] = {"recipe": reference.report.recipe, "new_tokens": options.new_tokens}
    for path, backend in PATHS.items():
        session = qcompiler.load(options.artifact, backend)
        rows = []
        for prompt in PROMPTS:
            ids = session.tokenizer(prompt, return_tensors="pt")["input_ids"]
            found = agreement(reference.runner, session.runner, ids, options.new_tokens)
            rows.append({"prompt": prompt, **asdict(found), "tied": max(found.gaps) <= found.difference})
            print(f"{path}: {found.same} of {found.asked} tokens the same: {prompt}", flush=True)
        figures[path] = {"identical": sum(row["same"] == row["asked"] for row in rows), "prompts": rows}
    print("written to", write("agreement", figures))


if __name__ == "__main__":
    main()
