"""`luthier predict RUN FILE`: what a tuned model makes of rows, one JSON object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from luthier.cli.console import err, quiet_libraries
from luthier.cli.progress import choose_progress
from luthier.errors import DataError
from luthier.imports import importing


def predict_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[Path, typer.Argument(metavar="FILE", help="Rows to predict for; they may lack the answer.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write here [default: standard output].")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest reply of a task that writes.")
    ] = 256,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the result alone.")] = False,
) -> None:
    """Predict for every row of a file, in batches, and write a line of JSON for each, in order.

    A row that cannot be predicted for gets a line with its `error`; the exit code is 2 then.
    """
    progress = choose_progress(quiet=quiet)
    progress.stage("Starting")
    try:
        quiet_libraries()
        with importing():
            from luthier.worker.predict_file import predict_file

        result = predict_file(run, data, output, max_new_tokens=max_new_tokens, progress=progress)
    finally:
        progress.close()
    if output is not None and not quiet:
        err().print(Text(f"{result.num_rows:,} lines in {output}"), soft_wrap=True)
    if result.num_errors:
        err().print(Text(f"{result.num_errors:,} of them could not be predicted for; each says why"), soft_wrap=True)
        raise typer.Exit(DataError.exit_code)
