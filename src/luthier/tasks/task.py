"""What a task is: one page of verbs between a raw row and what the engine trains on, predicts and is judged by.

    row --shape--> mapping --parse--> record --examples--> Example (tokens, loss weights, a class or tags)
                                             --prompts---> Prompt  (what to generate from, and the right answer)
                                             --queries---> Example (what a head reads)

    what the model wrote, or a head's probabilities --read--> prediction --mark-----> Marks (what scores are made of)
                                                                         --present--> a line of `luthier predict`

`luthier.tasks.shapes` does the first arrow, for every task; the rest is here. `tasks/defaults.py` has the verbs of
tasks without classes, and of those that write. A task is added as a folder
`tasks/<name>/` with `schema.py` (record and options), `render.py` (these verbs) and `metrics.py` (pure functions that
judge), and a line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.data.template import Renderer
from luthier.types import NO_CLASS, Example, Objective, Prompt

Truncation = Literal["error", "drop", "end", "start"]

Probabilities = NDArray[np.float32]
"""[positions, classes]: what a head gives at each position of one example that it reads."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What one prediction adds to the scores.

    Attributes:
        reply: The prediction as a person reads it.
        reference: What counts as right, likewise.
        is_right: Whether the prediction is right as a whole; None where that says nothing.
        is_exact: What "exact_match" counts; None for tasks that do not report it.
        class_index, predicted_class: What "accuracy" and "macro_f1" count, or `NO_CLASS`.
        ratios: Metric -> (above, below): the score of many rows is the sum of the one over the sum of the other.
        statistics: Metric of a whole corpus ("chrf", "bleu") -> the sums that it is computed from.
        parts: Kind of thing within the row (a type of entity) -> its own ratios.
        group: The row's own kind, for a breakdown, or None.
        reference_ratios: What the reference itself would score, where that is not 1 by definition.
    """

    reply: str
    reference: str
    is_right: bool | None = None
    is_exact: bool | None = None
    class_index: int = NO_CLASS
    predicted_class: int | None = None
    ratios: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    statistics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    group: str | None = None
    reference_ratios: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Record(Protocol):
    """One checked row of a task: a small frozen dataclass."""

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; the task's `from_json` reads them back to an equal record."""
        ...


class Task(Protocol):
    """What is learnt. Stateless but for its options; safe to share between threads."""

    @property
    def name(self) -> str:
        """The name in a recipe: "chat"."""
        ...

    @property
    def objective(self) -> Objective:
        """The loss that the engine computes on this task's examples."""
        ...

    @property
    def generates(self) -> bool:
        """Whether the tuned model is judged by what it writes, so that `prompts` gives something."""
        ...

    @property
    def chooses(self) -> bool:
        """Whether the prediction is that of its `labels` whose words the model finds likeliest after the prompt."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that records name, in order; empty for tasks without classes, and before they are known."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the head's classes are called, in order: the labels, or the tags made of them."""
        ...

    @property
    def threshold(self) -> float | None:
        """The probability from which on a label is given; None for tasks that do not decide label by label."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages that judging needs, each of an extra (`extras.py`)."""
        ...

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with its classes settled. Tasks without classes return themselves.

        Raises:
            DataError: for too few classes, or one named twice.
        """
        ...

    def parse(self, row: Mapping[str, Any]) -> Any:
        """Check one shaped row and make it the task's record.

        Raises:
            RowError: naming the field, what was found, what was expected and how to mend it.
        """
        ...

    def parse_query(self, row: Mapping[str, Any]) -> Any:
        """`parse` for a row to predict for, which may lack the answer; the record then holds none.

        Raises:
            RowError: as `parse`, but for the answer.
        """
        ...

    def from_json(self, value: Mapping[str, Any]) -> Any:
        """The record that `to_json` wrote."""
        ...

    def labels_of(self, record: Any) -> tuple[str, ...]:
        """The record's classes, one for each thing that has one; empty for tasks without classes."""
        ...

    def examples(
        self, record: Any, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """Turn a record into what the engine trains on.

        Args:
            record: From `parse`.
            renderer: Tokenizer and chat template of the base.
            max_length: Most tokens in one example.
            truncation: What happens to a longer one. "error" raises; "drop" leaves it out; "end" and "start" cut there.
            row: Index of the record in its dataset, copied into the examples.

        Returns:
            At least one example, each with something to learn from; or an empty list, which means that the whole
            record was longer than `max_length` and `truncation` is "drop".

        Raises:
            RowError: kind "truncated" when the record is too long and `truncation` is "error", or when cutting would
                leave no label; kind "template" when the base's chat template refuses it.
        """
        ...

    def prompts(self, record: Any, renderer: Renderer, shots: Sequence[Any] = (), row: int = 0) -> list[Prompt]:
        """What to generate from to judge a model on this record, exactly as the record would be served.

        Args:
            record: From `parse`; held out from training.
            renderer: Tokenizer and chat template of the base.
            shots: Other records to show first, solved.
            row: Index of the record in its dataset.

        Returns:
            One prompt, or none for a task that is not judged by what it writes.
        """
        ...

    def queries(self, record: Any, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        """What a head reads of a record, in order, whatever its answer; empty for a task that writes.

        Positions that are read have some class in the examples, so that the engine gives probabilities there.

        Raises:
            RowError: kind "empty" for a record without tokens.
        """
        ...

    def read(self, record: Any, renderer: Renderer, max_length: int, given: Sequence[Probabilities]) -> Any:
        """A head's prediction.

        Args:
            record, renderer, max_length: As `queries` had them.
            given: What the head gave for each of these examples.
        """
        ...

    def mark(self, record: Any, prediction: Any, reference: str = "") -> Marks:
        """Hold a prediction against the record's answer.

        Args:
            record: From `parse`.
            prediction: What the model wrote, or what `read` made of a head's probabilities.
            reference: The prompt's, for tasks that write.
        """
        ...

    def present(self, record: Any, prediction: Any) -> dict[str, Any]:
        """The prediction as a line of `luthier predict`: plain JSON values."""
        ...

    def signatures(self, records: Sequence[Any]) -> dict[str, str]:
        """Metric -> how it is computed on these records, where there is more than one way."""
        ...
