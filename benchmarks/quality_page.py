"""docs/quality.md, from results/methods.json, methods_decoder.json and rptq.json.

python benchmarks/quality_page.py
"""

from pathlib import Path
from typing import Any

from common import results

PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
METHODS = """\
## Methods

Perplexity of SmolLM2-135M as a multiple of the float model's ({fp32:.2f}): {windows} windows of 512 tokens of
`{text}`, calibrated on {batches} x 2048 tokens that the model wrote itself, its channels shuffled at random first (the
file that it comes in holds 4-bit blocks of 32 channels, which methods that leave the order alone would find again).
Weights but the head's are quantized: 4 and 3 bits in groups of 64, 2 bits in groups of 32. A8: one scale a token, and
with rptq static ones for groups of 32. A4: norm outputs as A8, the rest with a scale for each token and group of 32.
KV4: keys by channel over 64 tokens, values by token in groups of 32. Empty cells are not measured yet."""
DECODER = """\
## Methods on a model with LayerNorms

The same on the model that `make decoder` trains: OPT's architecture, four layers, one channel in 64 of what its norms
make 50 times as loud as it was trained (perplexity {fp32:.1f} in float). The text is the last tenth of its own,
{windows} windows."""
RPTQ = """\
## RPTQ's configurations

Perplexity as a multiple of that of the program with the same weights and nothing else rounded (W4A16, W3A16; float for
KV): {windows} windows of 512 tokens of `{text}`, calibrated on {batches} x 2048 tokens that the model wrote itself.
The demo model, its channels reordered in groups of 32."""


def write_page() -> None:
    """Write the page from what was measured."""
    parts = ["# Quality", "Written by `make bench-quality`; the figures are those of `benchmarks/results/`."]
    for name, words in (("methods", METHODS), ("methods_decoder", DECODER)):
        if methods := results(name):
            parts += [words.format(**methods), "\n".join(_by_method(methods)), "\n".join(_winners(methods["ratio"]))]
    if rptq := results("rptq"):
        parts += [RPTQ.format(**rptq), "\n".join(_configurations(rptq))]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _by_method(figures: dict[str, Any]) -> list[str]:
    """One row a method, one column a configuration; the best of each column is bold."""
    ratios = figures["ratio"]
    best = {c: min(cell["ratio"] for cell in ratios[c].values()) for c in ratios}
    rows = dict.fromkeys(method for cells in ratios.values() for method in cells)
    lines = ["| method | " + " | ".join(ratios) + " |", "|---|" + "---|" * len(ratios)]
    for method in rows:
        cells = [ratios[c].get(method, {}).get("ratio") for c in ratios]
        texts = [
            "" if r is None else f"**{r:.3f}**" if r == best[c] else f"{r:.3f}"
            for c, r in zip(ratios, cells, strict=True)
        ]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return lines


def _winners(ratios: dict[str, Any]) -> list[str]:
    """What is best in each column, beside the best method alone."""
    lines = ["| configuration | best recipe | ratio | best method alone | ratio |", "|---|---|---|---|---|"]
    for configuration, cells in ratios.items():
        found = {method: cell["ratio"] for method, cell in cells.items()}
        alone = {method: ratio for method, ratio in found.items() if "+" not in method}
        best, single = min(found, key=lambda m: found[m]), min(alone or found, key=lambda m: found[m])
        lines.append(f"| {configuration} | {best} | {found[best]:.3f} | {single} | {found[single]:.3f} |")
    return lines


def _configurations(figures: dict[str, Any]) -> list[str]:
    lines = ["| configuration | ratio | asked for | passes after the weights |", "|---|---|---|---|"]
    for name, cell in figures.items():
        if isinstance(cell, dict) and "ratio" in cell:
            bar = f"{cell['bar']:g}" if "bar" in cell else ""
            passes = "K-Means clusters of any size" if cell["passes"].startswith("free") else f"`{cell['passes']}`"
            lines.append(f"| {name} | {cell['ratio']:.3f} | {bar} | {passes.replace('|', chr(92) + '|')} |")
    return lines


if __name__ == "__main__":
    write_page()
