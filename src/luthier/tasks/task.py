"""What a task is: one page of verbs between a raw row and what the engine trains on and is judged by.

    row --shape--> mapping --parse--> record --examples--> Example (tokens, loss weights or a class)
                                             --prompts---> Prompt  (what to generate from, and the right answer)

`luthier.tasks.shapes` does the first arrow, for every task; the rest is here. A task is added as a folder
`tasks/<name>/` with `schema.py` (record and options), `render.py` (these verbs) and `metrics.py` (pure functions that
judge), and a line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from luthier.data.template import Renderer
from luthier.types import Example, Objective, Prompt

Truncation = Literal["error", "drop", "end", "start"]


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
    def labels(self) -> tuple[str, ...]:
        """The classes in order; empty for tasks without classes, and before they are known."""
        ...

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with its classes settled. Tasks without classes return themselves."""
        ...

    def parse(self, row: Mapping[str, Any]) -> Any:
        """Check one shaped row and make it the task's record.

        Raises:
            RowError: naming the field, what was found, what was expected and how to mend it.
        """
        ...

    def from_json(self, value: Mapping[str, Any]) -> Any:
        """The record that `to_json` wrote."""
        ...

    def label_of(self, record: Any) -> str | None:
        """The record's class, or None for tasks without classes."""
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
