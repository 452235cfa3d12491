"""The table in docs/formats.md, from results/formats.json."""

from pathlib import Path
from typing import Any

from common import results

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def write_page(figures: dict[str, Any]) -> None:
    """Put the table between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{after}", encoding="utf-8")


def table(figures: dict[str, Any]) -> str:
    """One line a file; llama.cpp's and ours next to each other."""
    files: dict[str, dict[str, float]] = figures["files"]
    lines = ["| file | bits a weight | size | perplexity | against llama.cpp's |", "|---|--:|--:|--:|--:|"]
    for name, found in files.items():
        theirs = files.get(name.replace("qcompiler", "llama.cpp"), found) if "qcompiler" in name else None
        ratio = f"{100 * (found['perplexity'] / theirs['perplexity'] - 1):+.2f} %" if theirs else ""
        size, perplexity = f"{found['size_mb']:.1f} MB", f"{found['perplexity']:.3f}"
        lines.append(f"| {name} | {found['bits']:.2f} | {size} | {perplexity} | {ratio} |")
    where = f"{figures['windows']} windows of {figures['length']} tokens of {figures['text']}"
    return "\n".join([*lines, "", f"SmolLM2-135M, {where}, measured by llama.cpp, {figures.get('date', '')}."])


if __name__ == "__main__":
    write_page(results("formats"))
