"""Classification by a head: a text becomes one sequence with a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.tasks.classification.schema import ClassificationConfig, LabelledText
from luthier.tasks.classification.text import parse_label, read_text, unknown_label
from luthier.tasks.shapes import require_text
from luthier.tasks.task import Marks, Probabilities, Task, Truncation
from luthier.types import Example, Objective, Prompt


@dataclass(frozen=True)
class ClassificationTask:
    """`task: classification` with one class a text. See `luthier.tasks.task.Task` for the verbs."""

    config: ClassificationConfig = field(default_factory=ClassificationConfig)
    name: str = "classification"
    objective: Objective = "sequence_head"
    generates: bool = False
    chooses: bool = False
    labels: tuple[str, ...] = ()
    threshold: float | None = None
    needs: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.labels

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
        label = parse_label(row.get("label"))
        if self.labels and label not in self.labels:
            raise unknown_label(label, self.labels)
        return LabelledText(text, label)

    def parse_query(self, row: Mapping[str, Any]) -> LabelledText:
        return LabelledText(require_text(row.get("text"), "text"), "")

    def from_json(self, value: Mapping[str, Any]) -> LabelledText:
        return LabelledText.from_json(value)

    def labels_of(self, record: LabelledText) -> tuple[str, ...]:
        return (record.label,)

    def examples(
        self, record: LabelledText, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example with a class. `labels` must be settled before."""
        tokens = read_text(record.text, renderer, max_length, truncation)
        if tokens is None:
            return []
        if record.label not in self.labels:
            raise unknown_label(record.label, self.labels, in_training=False)
        index = self.labels.index(record.label)
        return [Example(tokens, np.zeros(tokens.shape, dtype=np.float32), index, row)]

    def queries(self, record: LabelledText, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        """The text as it was trained on, cut at its end; its class is open, and any stands for it."""
        tokens = read_text(record.text, renderer, max_length, "end")
        assert tokens is not None  # nothing is left out at the end
        return [Example(tokens, np.zeros(tokens.shape, dtype=np.float32), 0, row)]

    def read(
        self, record: LabelledText, renderer: Renderer, max_length: int, given: Sequence[Probabilities]
    ) -> dict[str, float]:
        """Label -> its probability, the likeliest first."""
        (probabilities_1K,) = given
        pairs = zip(self.labels, probabilities_1K[0].tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))

    def mark(self, record: LabelledText, prediction: Mapping[str, float], reference: str = "") -> Marks:
        best = next(iter(prediction))
        return Marks(
            reply=best,
            reference=record.label,
            is_right=best == record.label,
            class_index=self.labels.index(record.label),
            predicted_class=self.labels.index(best),
        )

    def present(self, record: LabelledText, prediction: Mapping[str, float]) -> dict[str, Any]:
        return {"label": next(iter(prediction)), "probabilities": {k: round(p, 6) for k, p in prediction.items()}}

    def signatures(self, records: Sequence[LabelledText]) -> dict[str, str]:
        return {}

    def prompts(
        self, record: LabelledText, renderer: Renderer, shots: Sequence[LabelledText] = (), row: int = 0
    ) -> list[Prompt]:
        return []
