"""Requantize a GGUF with llama.cpp (llama-cpp-python), for example Q4_1 to Q4_0; prints one JSON line."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

from peer_report import claim_stdout, memory_mb


def main() -> None:
    """Quantize and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", default="Q4_0", help="llama.cpp file type: Q4_0, Q4_1, Q8_0, Q4_K_M, F16, ...")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    out = claim_stdout()
    import llama_cpp

    names = (f"LLAMA_FTYPE_MOSTLY_{args.type.upper()}", f"LLAMA_FTYPE_ALL_{args.type.upper()}")
    kind = next((getattr(llama_cpp, name) for name in names if hasattr(llama_cpp, name)), None)
    if kind is None:
        raise SystemExit(f"unknown type {args.type}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = args.threads, kind, True
    start = time.perf_counter()
    status = llama_cpp.llama_model_quantize(str(args.input).encode(), str(args.output).encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize failed with {status}")
    report = {
        "peer": "llama_cpp",
        "version": importlib.metadata.version("llama-cpp-python"),
        "type": args.type,
        "seconds": time.perf_counter() - start,
        "peak_rss_mb": memory_mb("VmHWM"),
        "input_mb": args.input.stat().st_size / 2**20,
        "output_mb": args.output.stat().st_size / 2**20,
    }
    print(json.dumps(report), file=out)


if __name__ == "__main__":
    main()
