"""Requantize a GGUF with llama.cpp (llama-cpp-python), for example Q4_1 to Q4_0; prints one JSON line."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import struct
import time
from pathlib import Path
from typing import Any

from peer_report import claim_stdout, memory_mb


def importance(path: Path, lib: Any) -> Any:
    """An importance matrix (.dat: name, calls, sums for each entry) as llama_model_quantize takes it."""
    data, at = path.read_bytes(), 4
    entries = []
    for _ in range(struct.unpack_from("<i", data, 0)[0]):
        size = struct.unpack_from("<i", data, at)[0]
        name, at = data[at + 4 : at + 4 + size], at + 4 + size
        calls, count = struct.unpack_from("<ii", data, at)
        values = struct.unpack_from(f"<{count}f", data, at + 8)
        at += 8 + 4 * count
        entries.append((name, (ctypes.c_float * count)(*(v / calls for v in values)), count))
    table = (lib.llama_model_imatrix_data * (len(entries) + 1))()  # the last one has no name: it ends the list
    for i, (name, means, count) in enumerate(entries):
        table[i].name, table[i].data, table[i].size = name, ctypes.cast(means, ctypes.POINTER(ctypes.c_float)), count
    return table, entries


def main() -> None:
    """Quantize and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", default="Q4_0", help="llama.cpp file type: Q4_0, Q4_1, Q8_0, Q4_K_M, F16, ...")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix in the .dat format")
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
    if args.imatrix:
        table, _alive = importance(args.imatrix, llama_cpp)
        params.imatrix = table
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
