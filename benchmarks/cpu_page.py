"""docs/performance.md, from results/cpu.json and cpu_cache.json.

python benchmarks/cpu_page.py
"""

from pathlib import Path
from typing import Any

from common import results

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
HEAD = """\
# Performance on a CPU

Written by `make bench-cpu`; the figures are those of `benchmarks/results/cpu.json`. SmolLM2-135M, two threads on
{cpu}, every engine in a process of its own, a new one each round (but for torchao's, which compiles first), all
alternating in one run of {rounds} rounds: medians, and medians of the ratios by round.
Prefill reads 512 tokens, decode writes 128 behind 16.

gptq-w4a16 and gptq-w4a16-fast are recipes, compiled with `--samples 64`. "Tuned" is one program for everything: the
latter with longer groups in the layers that have most columns, tuned end to end, with a cache of 8-bit codes, and with
a second form that reads prompts in integers. The recipe `tuned-w4a16-fast` is near to it; this is the whole of it:

    qcompiler compile demo --samples 256 --backend 'onnxruntime{{integer_prompt=true}}' -o FOLDER -r 'canonicalize,
        gptq{{scheme=int4:g128:asym samples=64 exclude=*.down_proj*}},
        gptq{{scheme=int4:g256:asym samples=64 include=*.down_proj*}},
        gptq{{scheme=int4:g128:asym samples=64 include=@head}}, distill{{steps=128}},
        kv{{key=int8:channel:sym value=int8:channel:sym}}, fuse, kv_cache, pack'

"Tuned, one form" is the same without `--backend`, and "float cache" without `kv`."""
PARTS = """\
What a step of {model} ({step_ms:.2f} ms, 64 steps behind 16 tokens) saves without each part: medians over the steps of
{rounds} rounds, where graphs with and without it alternate step by step (`python benchmarks/decode_parts.py FOLDER`; to
wake the second thread for each of them is part of the rest)."""
PROMPTS = """\
## Prompts read in integers

`--backend 'onnxruntime{integer_prompt=true}'` writes a second form of the graph, which fills the caches and has no
head: its weights are rounded to 8 bits, one scale a row, what they multiply to 8 bits, one scale a token. It is cut
into four pieces, and the weights of one are in memory at a time. Perplexity of 256 tokens, one by one behind the 256
before them:"""
CACHE = """\
## A cache of codes

"Tuned" with a cache of floats and with one of 8-bit codes (a static scale a channel): 128 tokens behind 2048."""
WHERE = """\
## Where the time goes

A token of decoding reads {mb:.0f} MB of weights: {share:.0%} of the bandwidth that two threads reach here
({bandwidth:.1f} GB/s)."""
# What is measured, in words; the bar, if one was set; whether to be above it.
BARS: dict[str, tuple[str, float | None, bool]] = {
    "decode_vs_llama_cpp": ("decode, against the faster llama.cpp", 1.15, True),
    "prefill_vs_llama_cpp": ("prefill, against the faster llama.cpp", 1.5, True),
    "peak_memory_vs_llama_cpp": ("peak memory, against the same", 1.15, False),
    "decode_vs_genai": ("decode, against the model builder of onnxruntime-genai", 1.4, True),
    "decode_vs_openvino": ("decode, against OpenVINO", None, True),
    "prefill_vs_openvino": ("prefill, against OpenVINO", None, True),
    "decode_vs_torchao": ("decode, against PyTorch with torchao", None, True),
    "prefill_vs_torchao": ("prefill, against PyTorch with torchao", None, True),
}


def write_page() -> None:
    """Write the page from what was measured."""
    figures = results("cpu")
    if not figures:
        return
    parts = [HEAD.format(cpu=figures["machine"]["cpu"], rounds=figures["rounds"]), "\n".join(_engines(figures))]
    parts += ["\n".join(_bars(figures))]
    first = next(iter(figures["against"]))
    share, mb = figures["against"][first]["bandwidth_fraction"], figures["engines"][first]["mb_a_token"]
    parts.append(WHERE.format(mb=mb, share=share, bandwidth=figures["bandwidth_gb_s"]))
    if steps := results("decode_parts"):
        parts += [PARTS.format(**steps), "\n".join(_parts(steps))]
    if prompts := _prompts(figures):
        parts += [PROMPTS, "\n".join(prompts)]
    if cache := results("cpu_cache"):
        parts += [CACHE, "\n".join(_cache(cache))]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _engines(figures: dict[str, Any]) -> list[str]:
    lines = ["| engine | prefill, tokens/s | decode, tokens/s | load, s | peak memory, MB | perplexity |"]
    lines.append("|---|---|---|---|---|---|")
    for name, found in figures["engines"].items():
        paces = [_spread(found[f"{what}_tokens_per_s"]) for what in ("prefill", "decode")]
        quality = f"{found['perplexity']:.2f}" if "perplexity" in found else ""
        cells = [name, *paces, f"{found['load_s']:.2f}", f"{found['peak_rss_mb']:.0f}", quality]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.0f} ({found['worst']:.0f} to {found['best']:.0f})"


def _bars(figures: dict[str, Any]) -> list[str]:
    names = list(figures["against"])
    lines = ["| ratio | wanted | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for key, (words, bar, above) in BARS.items():
        cells = [figures["against"][name].get(key) for name in names]
        if any(cell is not None for cell in cells):
            shown = ["" if cell is None else f"{cell:.2f}" for cell in cells]
            wanted = "" if bar is None else f"{'at least' if above else 'at most'} {bar:g}"
            lines.append(f"| {words} | {wanted} | " + " | ".join(shown) + " |")
    return lines


def _parts(figures: dict[str, Any]) -> list[str]:
    lines = ["| part of a step | operators | ms | share |", "|---|---|---|---|"]
    for name, part in sorted(figures["parts"].items(), key=lambda item: -item[1]["ms"]):
        ms = max(part["ms"], 0.0)  # less than the noise
        lines.append(f"| {name} | {part['count']} | {ms:.2f} | {ms / figures['step_ms']:.0%} |")
    rest = figures["step_ms"] - sum(part["ms"] for part in figures["parts"].values())
    return [*lines, f"| the rest | | {rest:.2f} | {rest / figures['step_ms']:.0%} |"]


def _prompts(figures: dict[str, Any]) -> list[str]:
    lines = ["| program | perplexity behind a prompt read by the first form | by the second |", "|---|---|---|"]
    for name, found in figures["engines"].items():
        if "behind_prompt" in found:
            lines.append(f"| {name} | {found['behind_prompt']:.2f} | {found['behind_integer_prompt']:.2f} |")
    return lines if len(lines) > 2 else []


def _cache(figures: dict[str, Any]) -> list[str]:
    lines = ["| cache | decode, tokens/s | peak memory at 2048, MB | perplexity |", "|---|---|---|---|"]
    for name, found in figures["engines"].items():
        pace = _spread(found["long_tokens_per_s"])
        lines.append(f"| {name} | {pace} | {found.get('long_peak_rss_mb', 0):.0f} | {found.get('perplexity', 0):.2f} |")
    return lines


if __name__ == "__main__":
    write_page()
