"""`luthier compare RECIPE --methods ...`: one recipe with several methods, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from luthier.cli.console import err, out, print_columns, print_json
from luthier.cli.progress import choose_progress

if TYPE_CHECKING:
    from luthier.worker.compare import Comparison


def compare_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe that all methods share.")],
    methods: Annotated[
        str, typer.Option("--methods", metavar="NAME,...", help="Methods to compare, as in full,lora,qlora,prompt.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[METHOD:]FIELD=VALUE",
            help="Override a field for all methods, or for one: lora:train.learning_rate=1e-3.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Folder to write. Default: the recipe's output, with -compare."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the result alone.")] = False,
) -> None:
    """Train one recipe with each method, a process each, and set side by side what it takes and gives.

    Called again, it goes on: finished methods are kept.
    """
    from luthier.worker.compare import compare

    names = [name.strip() for name in methods.split(",") if name.strip()]
    progress = choose_progress(quiet=quiet)
    try:
        comparison = compare(recipe, names, output=output, overrides=overrides or [], progress=progress)
    except KeyboardInterrupt:
        progress.close()
        err().print(Text("Stopped. The same command goes on."))
        raise typer.Exit(130) from None
    finally:
        progress.close()
    if json:
        print_json(comparison.to_json())
    else:
        _print_comparison(comparison)
    if comparison.failed:
        err().print(Text(f"{', '.join(comparison.failed)} failed; the same command tries again."), soft_wrap=True)
        raise typer.Exit(2)


def _print_comparison(comparison: Comparison) -> None:
    from luthier.evaluate.comparison import facts, method_table

    console = out()
    print_columns(method_table(comparison.rows), console)
    for row in comparison.rows:
        if row.problem:
            console.print(Text(f"{row.method} failed: {row.problem}"), soft_wrap=True)
    for sentence in facts(comparison.rows):
        console.print(Text(sentence, style="dim"), soft_wrap=True)
    lines = [f"Table  {comparison.table}"] + ([f"Chart  {comparison.chart}"] if comparison.chart else [])
    console.print(Text("\n".join(lines)), soft_wrap=True)
