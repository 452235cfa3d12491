"""The tables in docs/formats.md, from results/formats.json and results/nf4.json."""

from pathlib import Path
from typing import Any

from common import fill, results

ENGINES = ("llama.cpp", "onnxruntime")
PAGE = Path(__file__).parent.parent / "docs" / "formats.md"


def write_page() -> None:
    """Put each table between its marks."""
    made = {"table": ("formats", table), "nf4": ("nf4", nf4)}
    known = {mark: write(found) for mark, (name, write) in made.items() if (found := results(name))}
    fill(PAGE, known)


def table(figures: dict[str, Any]) -> str:
    """One line a file; llama.cpp's and ours next to each other."""
    files: dict[str, dict[str, Any]] = figures["files"]
    engines = [engine for engine in ENGINES if any(engine in found.get("decode", {}) for found in files.values())]
    columns = ["bits a weight", "size", "perplexity", "against llama.cpp's", *(f"{e}, tokens/s" for e in engines)]
    lines = [f"| file | {' | '.join(columns)} |", "|---|" + len(columns) * "--:|"]
    for name, found in files.items():
        theirs = files.get(name.replace("qcompiler", "llama.cpp"), found) if "qcompiler" in name else None
        ratio = f"{100 * (found['perplexity'] / theirs['perplexity'] - 1):+.2f} %" if theirs else ""
        size, perplexity = f"{found['size_mb']:.1f} MB", f"{found['perplexity']:.3f}"
        paces = [str(found.get("decode", {}).get(engine, "")) for engine in engines]
        cells = [name, f"{found['bits']:.2f}", size, perplexity, ratio, *paces]
        lines.append(f"| {' | '.join(cells)} |")
    where = f"{figures['windows']} windows of {figures['length']} tokens of {figures['text']}"
    return "\n".join([*lines, "", f"SmolLM2-135M, {where}, measured by llama.cpp, {figures.get('date', '')}."])


def nf4(figures: dict[str, Any]) -> str:
    """One line for each way to store the scales."""
    lines = ["| scales | qcompiler | bitsandbytes | apart | in its own kernel |", "|---|--:|--:|--:|--:|"]
    for name, found in figures["perplexity"].items():
        cells = [f"{found[who]:.7f}" for who in ("qcompiler", "bitsandbytes")]
        cells += [f"{found['difference']:.1g}", f"{found['bitsandbytes in its own kernel']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    where = f"{figures['windows']} windows of {figures['length']} tokens of {figures['text']}"
    return "\n".join([*lines, "", f"SmolLM2-135M, perplexity on {where}, {figures['date']}."])


if __name__ == "__main__":
    write_page()
