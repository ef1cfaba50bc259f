"""`luthier eval RUN`: judge base and tuned model again, on the run's held-out rows or on another file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.console import out, print_json, print_scores, quiet_libraries
from luthier.cli.progress import choose_progress
from luthier.imports import importing


def eval_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Judge on this file instead of the held-out rows.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", metavar="N", min=1, help="Most rows to judge on.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the result alone.")] = False,
) -> None:
    """Judge base and tuned model on held-out rows: loss, perplexity, exact match, accuracy, each with its interval."""
    progress = choose_progress(quiet=quiet)
    progress.stage("Starting")
    try:
        quiet_libraries()
        with importing():
            from luthier.worker.judge import evaluate_run

        evaluation = evaluate_run(run, data=data, rows=rows, progress=progress)
    finally:
        progress.close()
    if json:
        print_json(evaluation)
    else:
        print_scores(evaluation, out())
