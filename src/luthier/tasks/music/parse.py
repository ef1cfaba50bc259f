"""From a row with ABC to the record: header and music apart, header lines filled in from other columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.data.rows import RowError, preview
from luthier.tasks.music.schema import AbcTune
from luthier.tasks.shapes import require_text

FIELD_COLUMNS = {"T": "title", "R": "rhythm", "M": "metre", "K": "key"}
"""Header field -> the column that fills it in where `abc` lacks it."""

_FIELD_LINE = re.compile(r"[A-Za-z+]:|%")
_ORDER = "XTRMLK"


def parse_tune(row: Mapping[str, Any], *, is_query: bool, needs_header: bool) -> AbcTune:
    """The record of a row with `abc`, and optionally `prompt` or `instruction`, title, rhythm, metre and key.

    Args:
        is_query: The row is to be predicted for: `abc` may be missing, or end with the header.
        needs_header: Whether the model is given the header.

    Raises:
        RowError: for no text, several tunes, no key, or no music.
    """
    prompts = [require_text(row[name], name) for name in ("prompt", "instruction") if row.get(name) is not None]
    text = "" if is_query and row.get("abc") is None else require_text(row.get("abc"), "abc")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n") if text else []
    _check_is_one(lines)
    header, body = _split(lines)
    header = _filled_in(header, row)
    if not any(line.startswith("K:") for line in header) and (needs_header or not is_query):
        raise RowError("abc", "has no K: field", "a header that names the key", "add K:, or a column key")
    if not body and not is_query:
        raise RowError("abc", "ends with its header", "music after the K: field", kind="empty")
    return AbcTune(prompts[0] if prompts else "", "\n".join(header), "\n".join(body))


def _check_is_one(lines: list[str]) -> None:
    starts = [n for n, line in enumerate(lines, start=1) if line.startswith("X:")]
    if len(starts) > 1:
        raise RowError("abc", f"holds {len(starts)} tunes", "one tune a row", "split it before each X:")
    blank = next((n for n, line in enumerate(lines, start=1) if not line.strip()), None)
    if blank is not None:
        raise RowError("abc", f"line {blank} is empty, which ends a tune", "one tune a row", "take the line out")


def _split(lines: list[str]) -> tuple[list[str], list[str]]:
    """The header's lines and the music's."""
    for n, line in enumerate(lines):
        if line.startswith("K:"):
            return lines[: n + 1], lines[n + 1 :]
        if not _FIELD_LINE.match(line):
            return lines[:n], lines[n:]
    return lines, []


def _filled_in(header: list[str], row: Mapping[str, Any]) -> list[str]:
    present = {line[0] for line in header if line[1:2] == ":"}
    lines = list(header)
    for letter, column in FIELD_COLUMNS.items():
        value = row.get(column)
        if value is None or letter in present:
            continue
        if not isinstance(value, str):
            raise RowError(column, f"is {preview(value)}", "a text")
        if value.strip():
            lines.append(f"{letter}: {' '.join(value.split())}".replace(": ", ":", 1))
    if len(lines) == len(header):
        return header
    if "X" not in present:
        lines.insert(0, "X:1")
    return sorted(lines, key=lambda line: _ORDER.index(line[0]) if line[0] in _ORDER else _ORDER.index("L"))
