"""Train a small decoder with LayerNorms (OPT's architecture), for measurements that need trained weights.

    python benchmarks/train_decoder.py [--text valid.txt]

Without a text of your own it reads the one that comes with Python, the pages of `help()`. The last tenth is held out:
neither the tokenizer nor the model sees it. Writes a model folder as transformers does, with the two parts of the text
as train.txt and held_out.txt, and figures.json: perplexity on windows of 512 tokens, in float and rounded, and how loud
the loudest channels are. A folder that is there already is left alone. The same seed, text, versions and number of
threads give the same weights.

A training of minutes makes few of the loud channels that OPT has, and 4-bit activations hardly hurt. So one channel in
64 of what each norm makes is scaled by 50, and the weights that read it by the inverse: the same function, as hard to
round as OPT's. `--loud 1` leaves the model as it was trained.
"""

import argparse
import json
import math
import pydoc_data.topics
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import stamp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from qcompiler import data, evaluate
from qcompiler.calibration import measure
from qcompiler.compiler import capture, tokenizer_of
from qcompiler.data import Calibration
from qcompiler.passes.statistics import AbsMax
from qcompiler.pipeline import Context, Runner
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.sites import Kind, find

NORMS = (torch.ops.aten.layer_norm.default,)
ROOT = Path(__file__).resolve().parent.parent
LENGTH = 512
VOCABULARY = 2048
SHORT = 128  # windows that most steps learn from; the last quarter sees whole ones
BATCH = 1024  # tokens a step
RATE = 1e-3  # of learning, at its highest
NORM_RATE = 0.1  # of the norms: a short training would hardly move them from 1, where long ones spread them
RECIPES = {
    "rtn int4:g32": "canonicalize, rtn{scheme=int4:g32}",
    "rtn int4:g32, activations int4:token:asym:dynamic": (
        "canonicalize, activations{scheme=int4:token:asym:dynamic}, rtn{scheme=int4:g32}"
    ),
    "rtn int4:g32, activations int8:tensor:asym": (
        "canonicalize, activations{scheme=int8:tensor:asym}, rtn{scheme=int4:g32}"
    ),
    "rtn int4:g32, activations int4:tensor:asym": (
        "canonicalize, activations{scheme=int4:tensor:asym}, rtn{scheme=int4:g32}"
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, measure; or leave what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text of a megabyte or so, UTF-8")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "decoder")
    parser.add_argument("--epochs", type=float, default=5.0, help="how often it reads the text")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--loud", type=float, default=50.0, help="factor of one channel in 64 after each norm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if (options.out / "figures.json").exists():
        print(f"{options.out} is there already; remove it to train anew")
        return
    build(options)


def build(options: argparse.Namespace) -> None:
    """The whole folder, first under another name: what is there is complete."""
    text = options.text.read_text(encoding="utf-8") if options.text else "\n\n".join(pydoc_data.topics.topics.values())
    parts = halves(text)
    unfinished = options.out.with_name(options.out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, part in parts.items():
        (unfinished / f"{name}.txt").write_text(part, encoding="utf-8")
    tokenizer = tokenizer_for(parts["train"])
    tokens = torch.tensor(tokenizer(parts["train"])["input_ids"])
    torch.manual_seed(options.seed)
    model = OPTForCausalLM(config(len(tokenizer), options.layers, options.hidden))
    start = time.perf_counter()
    steps = max(1, round(options.epochs * len(tokens) / BATCH))
    train(model, tokens, steps)
    seconds = time.perf_counter() - start
    model.eval().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if options.loud != 1:
        model.load_state_dict(made_loud(capture(str(unfinished)), options.loud), strict=False)
        model.save_pretrained(unfinished)
    name = options.text.name if options.text else "pydoc_data.topics"
    how = {"text": name, "tokens": len(tokens), "vocabulary": len(tokenizer), "steps": steps, "seconds": round(seconds)}
    how |= {"loud": options.loud} if options.loud != 1 else {}
    found = how | figures(unfinished)
    (unfinished / "figures.json").write_text(json.dumps(stamp() | found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(options.out, ignore_errors=True)
    unfinished.rename(options.out)
    print(json.dumps(found, indent=1))


def halves(text: str) -> dict[str, str]:
    """Nine tenths to train on and the last tenth, cut between two lines."""
    cut = text.index("\n", len(text) * 9 // 10) + 1
    return {"train": text[:cut], "held_out": text[cut:]}


def tokenizer_for(text: str) -> PreTrainedTokenizerFast:
    """Byte pairs of this text."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(text.splitlines(keepends=True), how)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token="<pad>", bos_token="</s>", eos_token="</s>")


def config(vocabulary: int, layers: int, hidden: int) -> OPTConfig:
    """OPT's architecture, small: LayerNorm before each block, relu, learned positions, biases, tied embeddings."""
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=LENGTH,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def train(model: OPTForCausalLM, tokens: Tensor, steps: int) -> None:
    """AdamW on random windows, short ones first; the rate rises for a twentieth of the steps, then falls."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for name, p in model.named_parameters() if "layer_norm" in name]
    biases = [p for name, p in model.named_parameters() if p.dim() < 2 and "layer_norm" not in name]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": RATE, "weight_decay": 0.1},
        {"params": norms, "lr": NORM_RATE, "weight_decay": 0.0},
        {"params": biases, "lr": RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.05 + 0.95 * (1 + math.cos(math.pi * i / steps)) / 2)
    )
    model.train()
    start, smooth = time.perf_counter(), 0.0
    for step in range(steps):
        length = SHORT if step < 0.75 * steps else LENGTH
        places = torch.randint(len(tokens) - length, (BATCH // length, 1)) + torch.arange(length)
        loss = model(input_ids=tokens[places], labels=tokens[places], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if not step else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {smooth:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def made_loud(program: Program, factor: float) -> dict[str, Tensor]:
    """The program's tensors, one channel in 64 of what each norm makes scaled by `factor`: the same function."""
    for site in find(program, Kind.SCALE):
        if any("layer_norm" in use.tensor for use in site.uses):
            factors = torch.ones(site.blocks, site.channels)
            factors[:, torch.randperm(site.channels, generator=torch.Generator().manual_seed(0))[::64]] = factor
            site.scale(program, factors)
    return program.tensors


def figures(folder: Path) -> dict[str, Any]:
    """Perplexity on the held-out text, in float and rounded, and the loudest channels."""
    program = capture(str(folder))
    tokenizer = tokenizer_of(program)
    tokens = torch.tensor(tokenizer((folder / "held_out.txt").read_text(encoding="utf-8"))["input_ids"])
    samples = data.load(Calibration(folder / "train.txt", 32, LENGTH), program, tokenizer)

    def perplexity(of: Program) -> float:
        return round(evaluate.perplexity(lambda ids: of(input_ids=ids)["logits"], tokens, LENGTH), 3)

    found: dict[str, Any] = {"windows": len(tokens) // LENGTH, "float": perplexity(program)}
    for name, recipe in RECIPES.items():
        copy = program.copy()
        Runner(Context(samples), data.check_samples(copy)).run(copy, Recipe.parse(recipe).passes)
        found[name] = perplexity(copy.decoded())
    return found | {"loudest channel / median channel": loudness(program, samples)}


def loudness(program: Program, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Of what each norm makes, the largest magnitude of a channel over that of the median channel."""
    readers = {str(n.args[0].meta["path"]): n.name for n in program.linears() if n.args[0].target in NORMS}
    largest = measure(program, samples, {name: AbsMax() for name in readers.values()})
    return {norm: round(float(largest[name].max() / largest[name].median()), 2) for norm, name in readers.items()}


if __name__ == "__main__":
    main()
