"""What a task shows of its held-out rows besides text: pictures for the report, files to open elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Judged:
    """A held-out row and what each model wrote for it.

    Attributes:
        row: Its index in its dataset.
        record: The task's record.
        replies: Model ("base", "tuned") -> its reply.
    """

    row: int
    record: Any
    replies: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A file that shows something of a run.

    Attributes:
        name: File name; the report shows those that end in .svg or .png.
        content: The whole file.
        caption: What a picture shows.
    """

    name: str
    content: bytes
    caption: str = ""


def spread(rows: Sequence[Judged], most: int) -> list[Judged]:
    """At most so many of the rows, evenly from first to last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
