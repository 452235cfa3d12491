"""Converting a checkpoint needs the memory of one tensor: four times as many layers need no more."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from qcompiler.convert import convert
from qcompiler.formats.checkpoint import Checkpoint, Lazy, Value
from qcompiler.plugins import lookup
from qcompiler.scheme import QTensor, Scheme

HIDDEN, WIDE, VOCABULARY, GROUP = 512, 2048, 64, 64
LAYERS = (2, 8)


def weight(rows: int, columns: int) -> QTensor:
    """A random matrix of 4-bit codes."""
    chance = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=chance, dtype=torch.uint8)
    scale = torch.rand(rows, columns // GROUP, generator=chance).half()
    zero = torch.randint(1, 16, scale.shape, generator=chance, dtype=torch.uint8)
    return QTensor(Scheme.parse(f"int4:g{GROUP}:asym"), (rows, columns), codes, scale, zero)


def checkpoint(layers: int) -> Checkpoint:
    """A Llama of random codes, made as it is asked for."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": 8, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=True).to_dict()
    makers = {"model.embed_tokens.weight": partial(torch.ones, VOCABULARY, HIDDEN)}
    makers["model.norm.weight"] = partial(torch.ones, HIDDEN)
    for i in range(layers):
        path = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            makers[f"{path}.{name}.weight"] = partial(torch.ones, HIDDEN)
        shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE)}
        makers |= {f"{path}.{name}.weight": partial(weight, *shape) for name, shape in shapes.items()}  # type: ignore[misc]
    tensors: dict[str, partial[Value]] = dict(makers)
    return Checkpoint({**config, "architectures": ["LlamaForCausalLM"]}, Lazy(tensors))


def own_memory() -> int:
    """Bytes that belong to this process alone: what is mapped from files comes and goes as the system likes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_of_conversion(source: Path, out: Path) -> int:
    """By how much the process grew at most while it converted."""
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert(source, out, "compressed-tensors", verify=True)
    finally:
        done.set()
        watcher.join()
    return peak - before


def measure(base: Path) -> None:
    """Print the peaks of both checkpoints, after one conversion that loads what Python loads once."""
    form = lookup("formats", "gptq-v2")
    for layers in (1, *LAYERS):
        source = base / f"source-{layers}"
        form.write(checkpoint(layers), source, shard_bytes=3_000_000)
        assert len(list(source.glob("*.safetensors"))) > layers / 2
        print(layers, peak_of_conversion(source, base / f"out-{layers}"))


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="the memory of a process is read from Linux's /proc"
)
def test_memory_is_bounded_by_one_tensor(tmp_path: Path) -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # freed memory goes back
    command = [sys.executable, "-m", "tests.test_streaming", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = dict(map(int, line.split()) for line in done.stdout.splitlines())
    few, many = (peaks[layers] for layers in LAYERS)
    stored = [sum(file.stat().st_size for file in (tmp_path / f"out-{n}").glob("*.safetensors")) for n in LAYERS]
    assert many < 1.25 * few
    assert many - few < (stored[1] - stored[0]) / 4  # what it would grow by if a quarter of the rest were held


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
