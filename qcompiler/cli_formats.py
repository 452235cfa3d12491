"""The commands about checkpoint formats: convert and formats."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qcompiler.progress import Reporter


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(convert)
    app.command()(formats)


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A checkpoint folder, a compiled folder or a .gguf file.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write, or the .gguf file; not one that is there.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="See qcompiler formats.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read the result and compare every value.")] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the format cannot hold, and say the error.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
) -> None:
    """Write a quantized model in another format: codes are moved, never quantized again unless asked.

    Prints for each quantized tensor LOSSLESS, or refuses and says what would be lost.
    """
    from qcompiler.convert import convert as run

    console = Console()

    def tell(line: object) -> None:
        if not as_json:
            console.print(str(line), markup=False, highlight=False, soft_wrap=True)

    with Reporter() as progress:
        progress("converting", 0, 0)
        lines = run(source, out, to, verify=verify, requantize=requantize, tell=tell)
    if as_json:
        typer.echo(
            json.dumps({"folder": str(out), "verified": verify, "tensors": [asdict(x) for x in lines]}, indent=1)
        )
        return
    checked = ", every value compared" if verify else ""
    console.print(f"Written to {out} as {to}{checked}", markup=False, highlight=False, soft_wrap=True)


def formats(as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False) -> None:
    """Which formats there are, what they hold, and which conversions lose nothing, found by trying."""
    from qcompiler.convert import held_kinds, matrix
    from qcompiler.plugins import registry

    lost = matrix()
    known = {name: form for name, form in registry().formats.items() if name in lost}
    if as_json:
        typer.echo(
            json.dumps({name: {"holds": held_kinds(known[name]), "lost": lost[name]} for name in lost}, indent=1)
        )
        return
    console = Console()
    table = Table("from \\ to", *lost, title="Lossless conversions")
    for source, row in lost.items():
        total = len(held_kinds(known[source]))
        table.add_row(source, *("all" if not row[to] else f"{total - len(row[to])} of {total}" for to in row))
    console.print(table)
    for name, form in known.items():
        console.print(f"{name}: {form.conditions}", markup=False, highlight=False)
        console.print(f"  holds: {'; '.join(held_kinds(form))}", markup=False, highlight=False)
