"""RUN/exhibits: what a task shows of the judged rows besides text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.evaluate.metrics import RowScore
from luthier.evaluate.pictures import EXHIBITS, INDEX
from luthier.files import write_bytes
from luthier.tasks.exhibit import Judged
from luthier.tasks.registry import exhibitor_of
from luthier.tasks.task import Task
from luthier.worker.run_folder import RunFolder


def write_exhibits(
    folder: RunFolder, task: Task, record_of: Callable[[int], Any], scores: Mapping[str, Sequence[RowScore]]
) -> None:
    """Write the task's exhibits of the rows that a model replied to, and their index; nothing for most tasks.

    Args:
        record_of: Row -> its record.
        scores: Model -> what it did on each row.
    """
    make = exhibitor_of(task)
    if make is None:
        return
    replies: dict[int, dict[str, str]] = {}
    for who in ("base", "tuned"):
        for score in scores.get(who, ()):
            if score.reply is not None:
                replies.setdefault(score.row, {})[who] = score.reply
    exhibits = make(task, [Judged(row, record_of(row), found) for row, found in sorted(replies.items())])
    for exhibit in exhibits:
        write_bytes(folder.path / EXHIBITS / exhibit.name, exhibit.content)
    index = [{"file": exhibit.name, "caption": exhibit.caption} for exhibit in exhibits if exhibit.caption]
    folder.write_json(f"{EXHIBITS}/{INDEX}", index)
