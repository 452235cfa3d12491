"""Adapters trained on packed weights: QLoRA on NF4 with quantized scales, and LoRA on GPTQ's codes.

    python benchmarks/finetune.py --text valid.txt [--steps 30] [--only QLoRA]

Windows from the start of the text are trained on, one a step, and again if they are few; the last ones are held out.
Writes results/finetune.json and the table in docs/finetuning.md: losses, perplexity of the held-out windows before and
after, and what of the base is in memory; what is there already is not measured again. Rank, targets and optimizer are
QLoRA's (arXiv 2305.14314), the rate is higher because the steps are few.
"""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import fill, resumed, write
from torch import Tensor, nn

from qcompiler import compile, evaluate, load, to_torch
from qcompiler.report import Meter
from qcompiler.source import demo_model
from qcompiler.torch_model import QuantizedLinear

PAGE = Path(__file__).parent.parent / "docs" / "finetuning.md"
LENGTH, HELD_OUT, RATE = 256, 4, 1e-3
CALIBRATION = {"samples": 16, "length": 256}
RECIPES = {
    "QLoRA": "canonicalize, nf4{double=true}, fuse, kv_cache, pack",
    "LoRA on GPTQ": "canonicalize, gptq{scheme=int4:g64:asym}, fuse, kv_cache, pack",
}


def main() -> None:
    """Train an adapter on each base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", default="", help="only bases whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args()
    setting = {"text": options.text.name, "steps": options.steps, "length": LENGTH, "held_out": HELD_OUT, "rate": RATE}
    figures = resumed("finetune", setting, options.fresh)
    bases = figures.setdefault("bases", {})
    for name, recipe in RECIPES.items():
        if options.only in name and name not in bases:
            bases[name] = {"recipe": recipe} | finetuned(recipe, options.text, options.steps)
            print(name, bases[name], flush=True)
            write("finetune", figures)
    fill(PAGE, {"finetune": table(figures)})


def finetuned(recipe: str, text: Path, steps: int) -> dict[str, Any]:
    """Compile, train an adapter, save it, load it again; what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        base, rows = compiled(recipe, text, Path(folder) / "base")
        return adapted(base, rows, steps, Path(folder))


def compiled(recipe: str, text: Path, folder: Path) -> tuple[Any, Tensor]:
    """The base, saved as an artifact too, and the text's windows; of the session, which decodes, nothing stays."""
    session = compile(demo_model(), recipe, backend="reference", calibration=text, **CALIBRATION)
    session.save(folder)
    tokens = evaluate.encode(session.tokenizer, text.read_text(encoding="utf-8"))
    return to_torch(session), torch.cat(evaluate.windows(tokens, LENGTH))


def adapted(base: Any, rows: Tensor, steps: int, folder: Path) -> dict[str, Any]:
    """What becomes of a base, whose artifact is `folder`/base, and an adapter on it."""
    import peft

    before = [buffer.clone() for buffer in base.buffers()]
    figures: dict[str, Any] = {"base": sizes(base), "perplexity": {"base": held_out(base, rows)}}
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=64, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    with Meter() as meter:
        figures["losses"] = train(model.train(), rows[torch.arange(steps) % (len(rows) - HELD_OUT)])
    print(figures["losses"], flush=True)
    figures["seconds_a_step"] = round(meter.seconds / steps, 2)
    figures["perplexity"]["trained"] = held_out(model.eval(), rows)
    figures["same_codes"] = all(map(torch.equal, base.buffers(), before))
    figures["decoded_weights_in_memory"] = decoded(base)
    figures["adapter_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder / "adapter")
    figures["adapter_mb"] = round(evaluate.size_mb(folder / "adapter"), 2)
    floats = to_torch(load(folder / "base", "reference"), dequantize=True)
    merged = peft.PeftModel.from_pretrained(floats, folder / "adapter").merge_and_unload()
    figures["perplexity"]["merged into floats"] = held_out(merged.eval(), rows)
    return figures


def table(figures: dict[str, Any]) -> str:
    """One line a base."""
    columns = ["base", "base in memory", "as floats", "loss", "perplexity", "adapter"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + (len(columns) - 1) * "--:|"]
    for name, found in figures["bases"].items():
        first, last = (sum(part) / 5 for part in (found["losses"][:5], found["losses"][-5:]))
        sizes = [f"{found['base'][key]:.0f} MB" for key in ("packed_mb", "as_floats_mb")]
        perplexity = f"{found['perplexity']['base']:.2f} to {found['perplexity']['trained']:.2f}"
        cells = [name, *sizes, f"{first:.3f} to {last:.3f}", perplexity, f"{found['adapter_mb']:.0f} MB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{figures['steps']} steps of {figures['length']} tokens of {figures['text']}."])


def train(model: Any, rows: Tensor) -> list[float]:
    """The loss of each row [length], before the step that it makes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for row in rows:
        loss = model(input_ids=row[None], labels=row[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 4))
    return losses


def held_out(model: Any, rows: Tensor) -> float:
    """Perplexity of the last windows."""
    tokens = rows[-HELD_OUT:].flatten()
    return round(evaluate.perplexity(lambda ids: model(input_ids=ids).logits, tokens, LENGTH), 4)


def sizes(model: nn.Module) -> dict[str, float]:
    """Bytes of the quantized layers as they are and as floats, and of all else, in MB."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    packed = sum(b.nbytes for layer in layers for b in layer.buffers())
    every = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    floats = sum(4 * layer.in_features * layer.out_features for layer in layers)
    found = {"packed_mb": packed, "as_floats_mb": floats, "rest_mb": every - packed}
    return {name: round(value / 1e6, 2) for name, value in found.items()}


def decoded(base: nn.Module) -> int:
    """How many float matrices with the shape of a quantized layer are alive; adapters have other shapes."""
    shapes = {(m.out_features, m.in_features) for m in base.modules() if isinstance(m, QuantizedLinear)}
    gc.collect()
    known = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter) and not found.is_meta]
    return sum(tensor.is_floating_point() and tuple(tensor.shape) in shapes for tensor in known)


if __name__ == "__main__":
    main()
