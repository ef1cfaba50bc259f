"""From a recipe's `task` section to the task itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.tasks.chat.render import ChatTask
from luthier.tasks.classification.render import ClassificationTask
from luthier.tasks.completion.render import CompletionTask
from luthier.tasks.config import TaskConfig
from luthier.tasks.task import Task
from luthier.tasks.text.render import TextTask

_TASKS: dict[str, Callable[[Any], Task]] = {
    "chat": ChatTask,
    "completion": CompletionTask,
    "text": TextTask,
    "classification": lambda config: ClassificationTask(config, labels=tuple(config.labels or ())),
}


def task_for(config: TaskConfig) -> Task:
    """The task that a recipe's `task` section describes."""
    return _TASKS[config.type](config)
