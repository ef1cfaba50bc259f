"""`luthier export RUN --merged`: files that other runtimes read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from luthier.cli.console import out, quiet_libraries
from luthier.cli.progress import choose_progress
from luthier.errors import RunError
from luthier.imports import importing


class ExportDtype(StrEnum):
    """Precision of the exported weights; `auto` is the base's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Write base and adapter as one model in transformers' format.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write [default: RUN/merged].")
    ] = None,
    dtype: Annotated[ExportDtype, typer.Option("--dtype", help="Precision of the weights.")] = ExportDtype.auto,
) -> None:
    """Write the tuned model for other runtimes; the export is loaded again and compared before it counts."""
    if not merged:
        raise RunError(
            "no kind of export is named",
            "--merged",
            f"`luthier export {run} --merged`; the adapter itself lies in {run / 'adapter'} in PEFT's format already",
        )
    progress = choose_progress()
    progress.stage("Starting")
    try:
        quiet_libraries()
        with importing():
            from luthier.worker.export import export_run

        folder = export_run(run, output or run / "merged", dtype=dtype.value, progress=progress)
    finally:
        progress.close()
    out().print(Text(str(folder)), soft_wrap=True)
