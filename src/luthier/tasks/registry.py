"""From a recipe's `task` section to the task itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.tasks.art.exhibit import exhibits as art_exhibits
from luthier.tasks.art.render import ArtTask
from luthier.tasks.chat.render import ChatTask
from luthier.tasks.classification.choose import classification_task
from luthier.tasks.completion.render import CompletionTask
from luthier.tasks.config import TaskConfig
from luthier.tasks.exhibit import Exhibit, Judged
from luthier.tasks.music.exhibit import exhibits as music_exhibits
from luthier.tasks.music.render import MusicTask
from luthier.tasks.preference.render import PreferenceTask
from luthier.tasks.qa.render import QaTask
from luthier.tasks.tagging.render import TaggingTask
from luthier.tasks.task import Task
from luthier.tasks.text.render import TextTask
from luthier.tasks.translation.render import TranslationTask
from luthier.types import HeadKind, Objective

_TASKS: dict[str, Callable[[Any], Task]] = {
    "chat": ChatTask,
    "completion": CompletionTask,
    "preference": PreferenceTask,
    "text": TextTask,
    "qa": QaTask,
    "translation": TranslationTask,
    "music": MusicTask,
    "art": ArtTask,
    "classification": classification_task,
    "tagging": lambda config: TaggingTask(config, labels=tuple(config.labels or ())),
}

_EXHIBITS: dict[str, Callable[[Any, Sequence[Judged]], list[Exhibit]]] = {
    "music": music_exhibits,
    "art": art_exhibits,
}

_HEADS: dict[Objective, HeadKind] = {
    "sequence_head": "sequence",
    "multilabel_head": "multilabel",
    "token_head": "token",
}


def task_for(config: TaskConfig) -> Task:
    """The task that a recipe's `task` section describes."""
    return _TASKS[config.type](config)


def head_of(task: Task) -> HeadKind | None:
    """What the task's head says a class of; None for a task without a head."""
    return _HEADS.get(task.objective)


def exhibitor_of(task: Task) -> Callable[[Any, Sequence[Judged]], list[Exhibit]] | None:
    """What makes the task's exhibits of (task, rows); None for the tasks that show text alone."""
    return _EXHIBITS.get(task.name)
