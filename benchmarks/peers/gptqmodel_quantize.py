"""Quantize a Hugging Face model directory with GPTQModel on the CPU; print one JSON line.

Runs inside the peer environment (see README.md). The weights GPTQModel would ship (packed codes, zero points
and scales of its own checkpoint) are unpacked to float32 and written under their Hugging Face names, so that
any evaluator can load them into the original model and compare.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peer_report import claim_stdout, memory_mb, reset_peak_memory


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("output", type=Path, help="safetensors file for the dequantized float32 weights")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    scheme = parser.add_mutually_exclusive_group()
    scheme.add_argument("--sym", dest="sym", action="store_true", help="symmetric codes")
    scheme.add_argument("--asym", dest="sym", action="store_false", help="asymmetric codes (the default)")
    parser.add_argument("--calibration", type=Path, required=True, help='JSON lines {"input_ids": [...]}')
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def unpack(words: Any, bits: int, count: int) -> Any:
    """The first `count` codes of `bits` bits packed from the low bit up along the first axis of int32 words."""
    import numpy as np

    stream = (words.view(np.uint32)[:, None] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    digits = stream.reshape(-1, words.shape[1])[: count * bits].reshape(count, bits, words.shape[1])
    return (digits << np.arange(bits, dtype=np.uint32)[None, :, None]).sum(1).astype(np.int32)


def dequantized(checkpoint: Path, bits: int, zero_offset: int) -> Iterator[tuple[str, Any, int]]:
    """Yield (module name, float32 weight [out, in], number of groups) for each packed linear layer."""
    import numpy as np
    from safetensors import safe_open

    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in sorted(tensors.keys()):
                if not key.endswith(".qweight"):
                    continue
                name = key.removesuffix(".qweight")
                scales = tensors.get_tensor(f"{name}.scales").float().numpy()
                group = tensors.get_tensor(f"{name}.g_idx").long().numpy()
                codes = unpack(tensors.get_tensor(key).numpy(), bits, len(group))
                packed_zeros = np.ascontiguousarray(tensors.get_tensor(f"{name}.qzeros").numpy().T)
                zeros = unpack(packed_zeros, bits, scales.shape[1]).T + zero_offset
                yield name, np.ascontiguousarray((scales[group] * (codes - zeros[group])).T, np.float32), len(scales)


def quantize(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Load, quantize (timed), save to a temporary folder, unpack; fills in the report."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors.torch import save_file

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    lines = args.calibration.read_text().splitlines()
    windows = [json.loads(line)["input_ids"] for line in lines if line.strip()]
    report["calibration"] = {"windows": len(windows), "tokens": sum(map(len, windows))}
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    config = QuantizeConfig(
        bits=args.bits, group_size=args.group_size, sym=args.sym, format="gptq_v2", offload_to_disk=False
    )
    settings = ("desc_act", "act_group_aware", "damp_percent", "true_sequential", "mse", "static_groups")
    report["config"] = {key: getattr(config, key, None) for key in settings}
    model = GPTQModel.load(str(args.model), config, device="cpu", dtype=getattr(torch, args.dtype))
    report["peak_excludes_loading"] = reset_peak_memory()
    report["rss_before_mb"] = memory_mb("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    model.quantize(samples, batch_size=args.batch_size, calibration_sort=None, backend=BACKEND.GPTQ_TORCH)
    report["seconds"] = round(time.perf_counter() - start, 2)
    report["cpu_seconds"] = round(time.process_time() - processor, 2)
    report["peak_rss_mb"] = memory_mb("VmHWM")
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        model.save(folder)
        saved = json.loads((Path(folder) / "quantize_config.json").read_text())
        report["saved_format"] = saved.get("checkpoint_format", saved.get("format"))
        report["checkpoint_mb"] = round(sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 2**20, 1)
        layers = list(dequantized(Path(folder), args.bits, 1 if report["saved_format"] == "gptq" else 0))
    save_file({f"{name}.weight": torch.from_numpy(weight) for name, weight, _ in layers}, str(args.output))
    report["layers"] = len(layers)
    report["groups"] = {str(weight.shape[1]): groups for _, weight, groups in layers}


def main() -> None:
    """Quantize and print the report, or what GPTQModel said when it refused."""
    args = arguments()
    out = claim_stdout()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores, 1, fails its own check
    report: dict[str, Any] = {
        "peer": "gptqmodel",
        **{key: getattr(args, key) for key in ("bits", "group_size", "sym", "dtype", "threads", "seed")},
        "versions": {name: importlib.metadata.version(name) for name in ("gptqmodel", "torch", "transformers")},
    }
    try:
        quantize(args, report)
    except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
        report["refused"] = f"{type(error).__name__}: {error}"
    print(json.dumps(report), file=out)


if __name__ == "__main__":
    main()
