"""Classification with any number of labels a text: each label is decided by itself, by its probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.tasks.classification.metrics import class_counts, set_ratios, set_ratios_by_label
from luthier.tasks.classification.schema import ClassificationConfig, TextWithLabels
from luthier.tasks.classification.text import parse_labels, read_text, unknown_label
from luthier.tasks.shapes import require_text
from luthier.tasks.task import Marks, Probabilities, Task, Truncation
from luthier.types import Example, Objective, Prompt

NO_LABELS = "(none)"
"""A text without labels, as a person reads it."""


@dataclass(frozen=True)
class MultilabelTask:
    """`task: {type: classification, multiple: true}`. See `luthier.tasks.task.Task` for the verbs."""

    config: ClassificationConfig = field(default_factory=lambda: ClassificationConfig(multiple=True))
    name: str = "classification"
    objective: Objective = "multilabel_head"
    generates: bool = False
    chooses: bool = False
    labels: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.labels

    @property
    def threshold(self) -> float:
        return self.config.threshold

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with its labels settled, in this order.

        Raises:
            DataError: for none, or one named twice.
        """
        if not labels or len(set(labels)) != len(labels):
            raise DataError(
                f"the labels are {', '.join(map(repr, labels)) or 'none'}",
                "one label or more, each once",
                "add rows with labels",
            )
        return replace(self, labels=tuple(labels))

    def parse(self, row: Mapping[str, Any]) -> TextWithLabels:
        text = require_text(row.get("text"), "text")
        labels = parse_labels(row.get("label"))
        for label in labels:
            if self.labels and label not in self.labels:
                raise unknown_label(label, self.labels)
        return TextWithLabels(text, labels)

    def parse_query(self, row: Mapping[str, Any]) -> TextWithLabels:
        return TextWithLabels(require_text(row.get("text"), "text"), ())

    def from_json(self, value: Mapping[str, Any]) -> TextWithLabels:
        return TextWithLabels.from_json(value)

    def labels_of(self, record: TextWithLabels) -> tuple[str, ...]:
        return record.labels

    def examples(
        self, record: TextWithLabels, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example with a flag for each label. `labels` must be settled before."""
        for label in record.labels:
            if label not in self.labels:
                raise unknown_label(label, self.labels, in_training=False)
        tokens = read_text(record.text, renderer, max_length, truncation)
        if tokens is None:
            return []
        flags = np.asarray([label in record.labels for label in self.labels], dtype=np.uint8)
        return [Example(tokens, np.zeros(tokens.shape, dtype=np.float32), row=row, class_flags=flags)]

    def queries(self, record: TextWithLabels, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        """The text as it was trained on, cut at its end."""
        return self.examples(replace(record, labels=()), renderer, max_length, "end", row)

    def read(
        self, record: TextWithLabels, renderer: Renderer, max_length: int, given: Sequence[Probabilities]
    ) -> dict[str, float]:
        """Label -> its probability, the likeliest first."""
        (probabilities_1K,) = given
        pairs = zip(self.labels, probabilities_1K[0].tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))

    def mark(self, record: TextWithLabels, prediction: Mapping[str, float], reference: str = "") -> Marks:
        """Labels that are right, given and true: of all together, of each, and whether all of the text's are right."""
        found, true = set(self._given(prediction)), set(record.labels)
        return Marks(
            reply=", ".join(sorted(found)) or NO_LABELS,
            reference=", ".join(record.labels) or NO_LABELS,
            is_right=found == true,
            ratios={"subset_accuracy": (float(found == true), 1.0), "micro_f1": set_ratios(found, true)["f1"]},
            statistics={"macro_f1": class_counts(found, true, self.labels)},
            parts=set_ratios_by_label(found, true),
        )

    def present(self, record: TextWithLabels, prediction: Mapping[str, float]) -> dict[str, Any]:
        return {
            "labels": self._given(prediction),
            "probabilities": {label: round(p, 6) for label, p in prediction.items()},
        }

    def signatures(self, records: Sequence[TextWithLabels]) -> dict[str, str]:
        return {"labels given": f"those with a probability of {self.threshold:g} or more (task.threshold)"}

    def prompts(
        self, record: TextWithLabels, renderer: Renderer, shots: Sequence[TextWithLabels] = (), row: int = 0
    ) -> list[Prompt]:
        return []

    def _given(self, prediction: Mapping[str, float]) -> list[str]:
        """The labels from the threshold on, the likeliest first."""
        return [label for label, probability in prediction.items() if probability >= self.threshold]
