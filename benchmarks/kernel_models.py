"""Decoding with whole models on the GPU at hand: random weights, our W4A16 beside bf16 under torch.compile.

    python benchmarks/kernel_models.py            # a Llama of a billion parameters; kernels.py runs this too
    python benchmarks/kernel_models.py --large    # and one of seven billion, for which the host needs 64 GB

Tokens a second for one sequence and for sixteen, the two sides in turns, medians. The other side is transformers' own
model with its static cache, `torch.compile(mode="reduce-overhead")`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import qcompiler
from qcompiler.backends.triton import Triton

RESULTS = Path(__file__).parent / "results" / "kernel_models.json"
SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
RECIPES = {
    "W4A16": "canonicalize, fuse, rtn{scheme=int4:g128:asym}, kv_cache, pack",
    "W4A16KV4": "canonicalize, fuse, rtn{scheme=int4:g128:asym}, "
    "kv{key=int4:token:asym:dynamic value=int4:token:asym:dynamic}, kv_cache, pack",
}
PROMPT, CAPACITY = 128, 512
Step = Callable[[Tensor], object]


def random_model(size: str) -> Any:
    """A Llama with random weights in bf16, on the CPU."""
    config = transformers.LlamaConfig(
        **SIZES[size], num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16"
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def ours(session: Any, batch: int) -> Step:
    """A step of our decoder, its prompt read."""
    decoder = session.runner.decoder(batch, CAPACITY)
    decoder.step(torch.ones(batch, PROMPT, dtype=torch.int64))
    step: Step = decoder.step
    return step


def theirs(model: Any, batch: int) -> Step:
    """A step of transformers' model under torch.compile, its prompt read."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=CAPACITY)
    device = next(model.parameters()).device
    with torch.no_grad():
        places = torch.arange(PROMPT, device=device)
        model(torch.ones(batch, PROMPT, dtype=torch.int64, device=device), past_key_values=cache, cache_position=places)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    place = torch.tensor([PROMPT], device=device)

    def step(ids: Tensor) -> object:
        with torch.no_grad():
            found = compiled(ids.to(device), past_key_values=cache, cache_position=place, use_cache=True).logits.cpu()
        place.add_(1)
        return found

    return step


def seconds(step: Step, batch: int, tokens: int = 16) -> float:
    """Of a token."""
    ids = torch.ones(batch, 1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(tokens):
        step(ids)
    return (time.perf_counter() - start) / tokens


def compare(size: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Every recipe beside bf16, in turns."""
    model = random_model(size)
    sessions = {name: qcompiler.compile(model, recipe, backend=Triton()) for name, recipe in RECIPES.items()}
    model = model.cuda()
    rows = []
    for batch in (1, 16):
        steps = {"bf16": theirs(model, batch)} | {name: ours(session, batch) for name, session in sessions.items()}
        for step in steps.values():
            seconds(step, batch)  # compiles, captures
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                taken[name].append(seconds(step, batch))
        found = {name: statistics.median(times) for name, times in taken.items()}
        rows += [
            {
                "model": size,
                "batch": batch,
                "recipe": name,
                "tokens_per_second": round(batch / took, 1),
                "times_bf16": round(found["bf16"] / took, 2),
            }
            for name, took in found.items()
        ]
        for row in rows[-len(found) :]:
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="seven billion parameters too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: nothing is measured")
    rows = [row for size in SIZES if size == "1B" or options.large for row in compare(size)]
    whole = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
