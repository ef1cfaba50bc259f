"""Where the command line writes: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from luthier.errors import LuthierError
from luthier.imports import importing

_VERDICT_STYLES = {"better": "green", "worse": "red", "failed": "red"}


WIDTH_OF_FILES = 160
"""Columns of a table that goes to a file or a pipe, which have no width of their own."""


def out() -> Console:
    """A console over the present standard output, for results."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)


def err() -> Console:
    """A console over the present standard error, for everything that is not a result."""
    return Console(file=sys.stderr, highlight=False)


def print_json(value: Any) -> None:
    """Write `value` as one indented JSON document on standard output; NaN and infinities become null."""
    json.dump(_finite(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def command_name() -> str:
    """How the user can call this command again: `luthier`, or its path where the name alone finds another or none."""
    called = Path(sys.argv[0])
    if called.name != "luthier" or shutil.which("luthier") == str(called):
        return "luthier"
    return os.path.relpath(called) if called.is_relative_to(Path.cwd()) else str(called)


def print_error(error: LuthierError) -> None:
    """Write an error's parts on standard error; what was found stands out on a terminal."""
    first, *more = error.message.split("\n")
    text = Text("error: ", style="bold red")
    text.append(first, style="bold")
    for line in more:
        label, separator, rest = line.partition(":")
        known = separator and label.strip() in ("expected", "to fix")
        text.append("\n")
        text.append(label + separator if known else line, style="green" if known else "")
        text.append(rest if known else "", style="not bold")
    # soft_wrap: a path or a command must stay on one line, to be copied.
    err().print(text, soft_wrap=True)


def facts_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Names and values in two columns under a title."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def print_scores(evaluation: Mapping[str, Any], console: Console) -> None:
    """The headline and the table of base against tuned; nothing where nothing was judged."""
    from luthier.evaluate.summary import headline, summary_table

    cells = summary_table(evaluation)
    if len(cells) == 1:
        return
    print_columns(cells, console, may_drop="change")  # two columns say the change already
    if sentence := headline(evaluation):
        console.print(Text(sentence, style="bold"), soft_wrap=True)
    if kept := headline(evaluation.get("replay") or {}):
        console.print(Text(f"General ability kept, by the replayed text: {kept}"), soft_wrap=True)


def print_columns(cells: list[list[str]], console: Console, may_drop: str | None = None) -> None:
    """Rows of text as a table, the header first.

    Where it is too wide, intervals in parentheses get a line of their own, and the column `may_drop` gives way.
    """
    table = _scores_table(cells)
    if Measurement.get(console, console.options.update(max_width=1000), table).maximum > console.width:
        dropped = cells[0].index(may_drop) if may_drop in cells[0] else None
        narrow = [[cell.replace(" (", "\n(") for place, cell in enumerate(row) if place != dropped] for row in cells]
        table = _scores_table(narrow)
    console.print(table)


def _scores_table(cells: list[list[str]]) -> Table:
    header, *rows = cells
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_VERDICT_STYLES.get(cell, "")) for cell in row))
    return table


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def quiet_libraries() -> None:
    """Keep the bars and remarks of transformers away from Luthier's own; loads transformers.

    Luthier says itself what it loads. Errors, and warnings of Luthier, are not touched.
    """
    import logging as python_logging
    import warnings

    # bitsandbytes warns at import of kernels that only some other machine would have; peft imports it where it is.
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
    # DeepSpeed talks on standard output, and accelerate imports it where it is. It sets its own level; a filter stays.
    python_logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= python_logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")

    with importing():
        from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
