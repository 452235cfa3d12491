"""llama.cpp's own perplexity of a GGUF (llama-cpp-python); prints one JSON line.

python llama_cpp_perplexity.py MODEL.gguf WINDOWS.jsonl [--context 1024] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from llama_cpp_bench import LlamaCpp
from peer_report import claim_stdout


def main() -> None:
    """Evaluate every window from an empty cache; the mean over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help='JSON lines {"input_ids": [...]}, all of one length')
    parser.add_argument("--context", type=int, default=1024, help="key-value slots")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    out = claim_stdout()
    engine = LlamaCpp(options.model, options.context, options.threads, flash=False)
    lines = options.windows.read_text().splitlines()
    losses = [engine.nll(json.loads(line)["input_ids"]) for line in lines if line.strip()]
    mean = statistics.mean(losses)
    print(json.dumps({"windows": len(losses), "nll": mean, "perplexity": math.exp(mean)}), file=out)


if __name__ == "__main__":
    main()
