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
from numpy.typing import NDArray

from luthier.data.rows import RowError, preview
from luthier.data.template import Renderer
from luthier.errors import DataError, nearest
from luthier.tasks.classification.schema import ClassificationConfig, LabelledText
from luthier.tasks.fit import cut_to, too_long
from luthier.tasks.shapes import require_text
from luthier.tasks.task import Marks, Probabilities, Task, Truncation
from luthier.types import Example, Objective, Prompt


@dataclass(frozen=True)
class ClassificationTask:
    """`task: classification`. See `luthier.tasks.task.Task` for the verbs."""

    config: ClassificationConfig = field(default_factory=ClassificationConfig)
    name: str = "classification"
    objective: Objective = "sequence_head"
    generates: bool = False
    labels: tuple[str, ...] = ()
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
        tokens = self._tokens(record, renderer, max_length, truncation)
        if tokens is None:
            return []
        return [Example(tokens, np.zeros(tokens.shape, dtype=np.float32), self._index(record.label), row)]

    def queries(self, record: LabelledText, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        """The text as it was trained on, cut at its end; its class is open, and any stands for it."""
        tokens = self._tokens(record, renderer, max_length, "end")
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

    def _tokens(
        self, record: LabelledText, renderer: Renderer, max_length: int, truncation: Truncation
    ) -> NDArray[np.int32] | None:
        """The text's tokens, or None where it is left out for its length."""
        ids = _strip_padding(renderer.with_bos(renderer.encode(record.text)), renderer.pad_id)
        if len(ids) > max_length and truncation == "error":
            raise too_long(len(ids), max_length)
        if len(ids) > max_length and truncation == "drop":
            return None
        tokens = np.asarray(ids, dtype=np.int32)
        weights = np.zeros(tokens.shape, dtype=np.float32)
        tokens, _ = cut_to(tokens, weights, renderer.bos_id, max_length, truncation)
        tokens = np.asarray(_strip_padding(tokens.tolist(), renderer.pad_id), dtype=np.int32)
        if len(tokens) <= int(renderer.bos_id is not None):
            raise RowError("text", f"{preview(record.text)} has no tokens of its own", "some text", kind="empty")
        return tokens

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
