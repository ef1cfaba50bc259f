"""The system turn that a run was trained with, so that chat asks as training did."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.store import RecordStore

NUM_RECORDS_READ = 50


def trained_system(run: str | Path) -> str | None:
    """The one system turn with which the run's first training conversations begin.

    Args:
        run: A run folder, or any other name, which has none.

    Returns:
        Its text; None where conversations begin without one, or with different ones, or the prepared data is gone.
    """
    folders = sorted(Path(run).glob("data/*/train_records"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        return None
    found = {_system_of(record) for record in islice(RecordStore(folders[-1]), NUM_RECORDS_READ)}
    return found.pop() if len(found) == 1 else None


def _system_of(record: Any) -> str | None:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not messages or messages[0]["role"] != "system":
        return None
    content = messages[0].get("content")
    return content if isinstance(content, str) else None
