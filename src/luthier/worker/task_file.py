"""`task.json`: beside a tuned model's files in the store, what its rows are and how they are rendered.

    {"format": 1, "task": {"type": "tagging", "labels": ["place"], ...}, "max_length": 512}

An adapter's own files say how to compute with it; this one lets a worker that never saw the job read rows as it did.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from luthier.errors import ModelError
from luthier.files import write_text
from luthier.tasks.config import TaskConfig
from luthier.tasks.registry import task_for
from luthier.tasks.task import Task

TASK_FILE = "task.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class LearntTask:
    """What a model was tuned for.

    Attributes:
        task: With its classes settled.
        max_length: Most tokens of an example, as in training.
    """

    task: Task
    max_length: int


def write_task(folder: Path, config: TaskConfig, task: Task, max_length: int) -> None:
    """Write the file.

    Args:
        config: The recipe's.
        task: What became of it with the data's classes.
    """
    values = config.model_dump(mode="json")
    if task.labels:
        values["labels"] = list(task.labels)
    text = json.dumps({"format": FORMAT, "task": values, "max_length": max_length}, ensure_ascii=False)
    write_text(folder / TASK_FILE, text + "\n")


def read_task(folder: Path) -> LearntTask:
    """Read the file.

    Raises:
        ModelError: where it is missing, or does not hold.
    """
    try:
        values = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"it is of format {values['format']}")
        config = TypeAdapter(TaskConfig).validate_python(values["task"])
        task = task_for(config)
        labels = getattr(config, "labels", None)
        return LearntTask(task.with_labels(labels) if labels else task, int(values["max_length"]))
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        reason = type(error).__name__ if isinstance(error, OSError | ValidationError) else str(error)
        raise ModelError(
            f"the model's files do not say what its rows are: {reason}", "task.json beside them", "tune it again"
        ) from None
