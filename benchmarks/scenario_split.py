"""A part of a set's training rows to choose by, apart from the rest as test is: no text stands on both sides."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

ORDER = "order"


def write_split(path: Path, folder: Path, share: float, by: str | None) -> tuple[Path, Path]:
    """Write the rows of a JSONL file to `folder`/train.jsonl and `folder`/held_out.jsonl; the same each time.

    Args:
        share: Of the rows (or of the groups of rows) that is held out.
        by: A column whose equal values stay together, as the questions of one text; `order` for the last rows of the
            file, as of a book; None for row by row.

    Returns:
        The two paths.
    """
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if by == ORDER:
        first = round(len(lines) * (1.0 - share))
        marks = [index >= first for index in range(len(lines))]
    else:
        groups = [line if by is None else str(json.loads(line)[by]) for line in lines]
        names = sorted(set(groups), key=lambda name: hashlib.sha256(name.encode()).digest())
        held_out = set(names[: max(1, round(share * len(names)))])
        marks = [group in held_out for group in groups]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for target, wanted in zip(paths, (False, True), strict=True):
        # Renamed when it is whole: processes of several variants write it at once.
        part = target.with_suffix(f".{os.getpid()}")
        text = "".join(f"{line}\n" for line, mark in zip(lines, marks, strict=True) if mark is wanted)
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    return paths
