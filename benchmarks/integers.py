"""Ways to run rounded activations on ONNX Runtime: integer matmuls or MatMulNBits' own 8-bit arithmetic, in one run.

    python benchmarks/integers.py [--rounds 7]

Compiles SmolLM2-135M once for each (round-to-nearest weights: speed does not depend on the method) into a temporary
folder, and measures prefill of 512 tokens and decode of 128, alternating. Writes results/integers.json: medians, and
the median of the ratios to the first by round; the kernels that ran, and what was refused.
"""

import argparse
import json
import statistics
from collections import Counter
from functools import partial
from typing import Any

import torch
from common import write
from speed import NEW, PROMPT, _alternate, _decode, _prefill, _spread

import qcompiler
from qcompiler.evaluate import vocabulary_of
from qcompiler.source import resolve

TAIL = "rtn{{scheme=int8:g128:sym include=@head}}, fuse, {0}kv_cache, pack"
FORMS = {
    "W8A16": "canonicalize, rtn{scheme=int8:g32:sym}, " + TAIL.format(""),
    "W4A16": "canonicalize, rtn{scheme=int4:g32:sym}, " + TAIL.format(""),
    "W8A8 dynamic": "canonicalize, activations, rtn{scheme=int8:g32:sym}, " + TAIL.format("integers, "),
    "W8A8 static, in integers": (
        "canonicalize, activations{scheme=int8:tensor:asym massive=0}, rtn{scheme=int8:channel:sym}, "
        + TAIL.format("integers, ")
    ),
    "W4A8 dynamic": "canonicalize, activations, rtn{scheme=int4:g32:sym}, " + TAIL.format("integers, "),
    "W4A8 static in groups": (
        "canonicalize, activations{scheme=int8:g32:asym massive=0}, rtn{scheme=int4:g32:sym}, "
        + TAIL.format("integers, ")
    ),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = resolve("demo").model
    sessions = {}
    for name, recipe in FORMS.items():
        text = [torch.arange(256)[None] * 7 % 4096]  # ranges do not change the speed
        sessions[name] = qcompiler.compile(model, recipe, backend="onnxruntime", calibration=text, samples=1)
        print("compiled", name, flush=True)
    first = next(iter(sessions.values()))
    ids = torch.randint(0, vocabulary_of(first.program), (1, PROMPT), generator=torch.Generator().manual_seed(0))
    figures: dict[str, Any] = {"prompt_tokens": PROMPT, "new_tokens": NEW, "forms": {name: {} for name in FORMS}}
    for what, measure in {"prefill": partial(_prefill, ids=ids), "decode": partial(_decode, ids=ids)}.items():
        samples = _alternate({name: partial(measure, session) for name, session in sessions.items()}, options.rounds)
        for name, found in samples.items():
            ratios = [a / b for a, b in zip(found, samples[next(iter(FORMS))], strict=True)]
            figures["forms"][name][f"{what}_tokens_per_s"] = _spread(found)
            figures["forms"][name][f"{what}_vs_first"] = round(statistics.median(ratios), 3)
    for name, session in sessions.items():
        refusals = Counter(str(text).partition(": ")[2] for text in session.report.details.get("refusals", []))
        figures["forms"][name] |= {
            "recipe": FORMS[name],
            "kernels": session.report.details["kernels"],
            "refusals": dict(refusals.most_common(4)),
        }
    print(json.dumps(figures, indent=1))
    print("written to", write("integers", figures))


if __name__ == "__main__":
    main()
