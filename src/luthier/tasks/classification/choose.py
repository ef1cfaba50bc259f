"""Which of the ways to classify a recipe asks for."""

from __future__ import annotations

from luthier.tasks.classification.multiple import MultilabelTask
from luthier.tasks.classification.render import ClassificationTask
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.classification.words import WordsTask
from luthier.tasks.task import Task


def classification_task(config: ClassificationConfig) -> Task:
    """`task: classification` as its options say."""
    labels = tuple(config.labels or ())
    if config.head == "words":
        task = WordsTask(config)
        return task.with_labels(labels) if labels else task
    return MultilabelTask(config, labels=labels) if config.multiple else ClassificationTask(config, labels=labels)
