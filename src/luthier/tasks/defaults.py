"""The verbs of `tasks/task.py` that tasks have in common: those without classes, and those that write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from luthier.data.template import Renderer
from luthier.tasks.task import Marks, Probabilities
from luthier.types import Example


class WithoutClasses:
    """A task whose records name no class."""

    labels: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    threshold: float | None = None
    chooses: bool = False

    def with_labels(self, labels: Sequence[str]) -> Self:
        return self

    def labels_of(self, record: Any) -> tuple[str, ...]:
        return ()


class Writes:
    """A task whose prediction is what the model writes, judged by whether that is the reference."""

    needs: tuple[str, ...] = ()

    def queries(self, record: Any, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        return []

    def read(self, record: Any, renderer: Renderer, max_length: int, given: Sequence[Probabilities]) -> Any:
        raise TypeError("a task that writes has no head to read")

    def mark(self, record: Any, prediction: str, reference: str = "") -> Marks:
        is_exact = exact_match(prediction, reference)
        return Marks(prediction, reference, is_right=is_exact, is_exact=is_exact)

    def signatures(self, records: Sequence[Any]) -> dict[str, str]:
        return {}


def exact_match(reply: str, reference: str) -> bool:
    """Whether the reply is the reference, white space around either aside. Nothing else is forgiven."""
    return reply.strip() == reference.strip()
