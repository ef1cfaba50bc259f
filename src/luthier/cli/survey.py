"""What a data file seems to hold, from its first rows: the guess that `luthier init` starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.files import open_rows
from luthier.data.lines import LineProblem, Row
from luthier.errors import DataError
from luthier.tasks.shapes import FORMATS, recognize, unpack_json

MAX_ROWS = 500
"""Rows read for a guess; a file of any size is surveyed in the same time."""

MAX_LABEL_CHARACTERS = 60
MIN_ROWS_PER_LABEL = 2.0
"""A column of short texts is taken for labels if each stands in this many rows on average."""

_SYNONYMS = {
    "label": (
        "intent",
        "category",
        "class",
        "class_name",
        "sentiment",
        "target",
        "topic",
        "tag",
        "labels",
        "categories",
    ),
    "prompt": ("question", "query", "input", "source", "request", "instruction", "user", "context", "text"),
    "completion": ("answer", "response", "output", "reply", "target", "translation", "summary", "assistant"),
    "text": (
        "sentence",
        "utterance",
        "review",
        "content",
        "body",
        "document",
        "passage",
        "query",
        "question",
        "message",
    ),
}
"""Field of a format -> names that columns of that meaning often have, in lower case."""

_HELD_OUT_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Survey:
    """The first rows of a file at a glance.

    Attributes:
        path: The file.
        num_rows: Rows read, at most `MAX_ROWS`.
        columns: Their columns, in the order of appearance.
        problem: The first row that cannot be read, as one line of text; None if all can.
        label_columns: Columns of short texts or numbers, or of lists of them, that repeat, as classes do.
        list_columns: Columns with a list somewhere.
    """

    path: Path
    num_rows: int
    columns: tuple[str, ...]
    problem: str | None = None
    label_columns: tuple[str, ...] = ()
    list_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guess:
    """A task, and how the file's columns become its fields.

    Attributes:
        task: Name of the task.
        format: Name of the format, as in `data.format`.
        fields: Field -> column, where they differ.
    """

    task: str
    format: str
    fields: dict[str, str] = field(default_factory=dict)


def survey(path: Path) -> Survey:
    """Look at a data file's first rows.

    Raises:
        DataError: for a file that cannot be opened, or whose first rows are all unreadable.
    """
    seen = list(islice(open_rows(path), MAX_ROWS))
    rows = [row for row in seen if isinstance(row, Row)]
    problems = [row for row in seen if isinstance(row, LineProblem)]
    if not rows:
        found = problems[0].message if problems else f"{path} holds no row"
        raise DataError(found, "rows of named columns", f"see all of it with `luthier check {path}`")
    columns = tuple(dict.fromkeys(str(name) for row in rows for name in row.values))
    return Survey(
        path=path,
        num_rows=len(rows),
        columns=columns,
        problem=problems[0].message if problems else None,
        label_columns=tuple(name for name in columns if _repeats([row.values.get(name) for row in rows])),
        list_columns=tuple(name for name in columns if any(_is_list(row.values.get(name)) for row in rows)),
    )


def guess(seen: Survey, task: str | None = None) -> Guess | None:
    """What the columns are good for, or None where nothing fits.

    Args:
        seen: From `survey`.
        task: Consider only this task.
    """
    format = recognize(seen.columns, task)
    if format is not None and (format != "text" or task is not None or len(seen.columns) == 1):
        return Guess(task or FORMATS[format].tasks[0], format)
    for format, candidate in _guesses(seen):
        if task is None or task in FORMATS[format].tasks:
            return Guess(task or FORMATS[format].tasks[0], format, candidate)
    return Guess(FORMATS[format].tasks[0], format) if format is not None else None


def held_out_beside(path: Path) -> Path | None:
    """A file beside `path` that is named as held-out rows are, or None."""
    files = (path.with_name(name + "".join(path.suffixes)) for name in _HELD_OUT_NAMES)
    return next((file for file in files if file != path and file.is_file()), None)


def _guesses(seen: Survey) -> list[tuple[str, dict[str, str]]]:
    """Formats whose every field some column's name or content suggests, each with its differing columns."""
    found = []
    label = _column_for("label", seen.label_columns)
    if label is None and len(seen.columns) == 2 and len(seen.label_columns) == 1:
        label = seen.label_columns[0]
    others = tuple(name for name in seen.columns if name != label)
    text = _column_for("text", others) or (others[0] if len(others) == 1 else None)
    if label is not None and text is not None:
        found.append(("classification", {"text": text, "label": label}))
    prompt = _column_for("prompt", seen.columns)
    completion = _column_for("completion", tuple(name for name in seen.columns if name != prompt))
    if prompt is not None and completion is not None:
        found.append(("prompt", {"prompt": prompt, "completion": completion}))
    return [(format, {name: column for name, column in fields.items() if name != column}) for format, fields in found]


def _column_for(meaning: str, columns: tuple[str, ...]) -> str | None:
    names = (meaning, *_SYNONYMS[meaning])
    ranked = [(names.index(column.lower()), column) for column in columns if column.lower() in names]
    return min(ranked)[1] if ranked else None


def _repeats(values: list[Any]) -> bool:
    items = [unpack_json(value) if _is_list(value) else [value] for value in values]
    present = [value for found in items for value in found if value is not None and value != ""]
    if not present or not all(isinstance(value, str | int) for value in present):
        return False
    distinct = set(map(str, present))
    short = all(len(text) <= MAX_LABEL_CHARACTERS for text in distinct)
    return short and len(distinct) > 1 and len(present) >= MIN_ROWS_PER_LABEL * len(distinct)


def _is_list(value: Any) -> bool:
    return isinstance(unpack_json(value), list | tuple)
