"""Put the demo's table into the README: run after `make demo`, which leaves its figures in build/demo.json."""

import json
from pathlib import Path

from common import stamp

from qcompiler.demo import ROWS, SHOWN_NAME

ROOT = Path(__file__).parent.parent
START, END = "<!-- demo: written by benchmarks/readme.py from the demo's figures -->", "<!-- /demo -->"


def main() -> None:
    """Replace what stands between the two marks."""
    figures = json.loads((ROOT / "build" / "demo.json").read_text(encoding="utf-8"))
    before, after = figures["before"], figures["after"]
    lines = [
        f"What `make demo` prints at its end ({SHOWN_NAME}, {figures['recipe']}, on ONNX Runtime):",
        "",
        "| | 32 bits | compiled | ratio |",
        "|---|---:|---:|---:|",
    ]
    for row in ROWS:
        old, new = float(before[row.key]), float(after[row.key])
        lines.append(f"| {row.title} | {row.form.format(old)} | {row.form.format(new)} | {new / old:.2f} x |")
    made = stamp()
    cpu, cores, date = made["machine"]["cpu"], made["machine"]["cores"], made["date"]
    lines += ["", f"Measured on {cpu}, {cores} cores, {date}."]
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    readme.write_text(f"{head}{START}\n\n" + "\n".join(lines) + f"\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
