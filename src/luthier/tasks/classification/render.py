"""Classification: a text becomes one sequence with a class.

    [BOS, where the tokenizer adds one] text

The head reads the hidden state at the last token. transformers' `*ForSequenceClassification` reads it at the right-most
token that is not the padding token; so that both are the same place, a text never ends in the padding token here: what
stands there of it is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.data.rows import RowError, preview
from luthier.data.template import Renderer
from luthier.errors import DataError, nearest
from luthier.tasks.classification.schema import ClassificationConfig, LabelledText
from luthier.tasks.fit import cut_to, too_long
from luthier.tasks.shapes import require_text
from luthier.tasks.task import Task, Truncation
from luthier.types import Example, Objective, Prompt


@dataclass(frozen=True)
class ClassificationTask:
    """`task: classification`. See `luthier.tasks.task.Task` for the verbs."""

    config: ClassificationConfig = field(default_factory=ClassificationConfig)
    name: str = "classification"
    objective: Objective = "sequence_head"
    generates: bool = False
    labels: tuple[str, ...] = ()

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with its classes settled, in this order.

        Raises:
            DataError: for fewer than two classes, or one named twice.
        """
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise DataError(
                f"the labels are {', '.join(map(repr, labels)) or 'none'}",
                "two or more different classes",
                "add rows of the other classes",
            )
        return replace(self, labels=tuple(labels))

    def parse(self, row: Mapping[str, Any]) -> LabelledText:
        text = require_text(row.get("text"), "text")
        label = _parse_label(row.get("label"))
        if self.labels and label not in self.labels:
            raise RowError(
                "label",
                f"{label!r} is not one of the {len(self.labels)} labels{nearest(label, self.labels)}",
                f"one of {_list(self.labels)}",
                "correct the label, or add it under task.labels",
                kind="label",
            )
        return LabelledText(text, label)

    def from_json(self, value: Mapping[str, Any]) -> LabelledText:
        return LabelledText.from_json(value)

    def label_of(self, record: LabelledText) -> str | None:
        return record.label

    def examples(
        self, record: LabelledText, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example with a class. `labels` must be settled before."""
        bos = [] if renderer.bos_id is None else [renderer.bos_id]
        ids = renderer.encode(record.text)
        ids = _strip_padding(ids if ids[:1] == bos and bos else bos + ids, renderer.pad_id)
        if len(ids) > max_length and truncation == "error":
            raise too_long(len(ids), max_length)
        if len(ids) > max_length and truncation == "drop":
            return []
        tokens = np.asarray(ids, dtype=np.int32)
        weights = np.zeros(tokens.shape, dtype=np.float32)
        tokens, _ = cut_to(tokens, weights, renderer.bos_id, max_length, truncation)
        tokens = np.asarray(_strip_padding(tokens.tolist(), renderer.pad_id), dtype=np.int32)
        if len(tokens) <= len(bos):
            raise RowError("text", f"{preview(record.text)} has no tokens of its own", "some text", kind="empty")
        return [Example(tokens, np.zeros(tokens.shape, dtype=np.float32), self._index(record.label), row)]

    def prompts(
        self, record: LabelledText, renderer: Renderer, shots: Sequence[LabelledText] = (), row: int = 0
    ) -> list[Prompt]:
        return []

    def _index(self, label: str) -> int:
        if label in self.labels:
            return self.labels.index(label)
        raise RowError(
            "label",
            f"{label!r} does not occur in the training rows{nearest(label, self.labels)}",
            f"one of {_list(self.labels)}",
            "add training rows of this class, or correct the label",
            kind="label",
        )


def _strip_padding(ids: Sequence[int], pad_id: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == pad_id:
        end -= 1
    return list(ids[:end])


def _parse_label(value: Any) -> str:
    # A column of whole numbers with gaps is read as floats from CSV and Parquet.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError("label", f"is {preview(value)}", "a text or a whole number")
    return require_text(value, "label").strip()


def _list(labels: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(labels[:limit])
    return shown if len(labels) <= limit else f"{shown} and {len(labels) - limit} more"
