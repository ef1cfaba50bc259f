"""Question answering: the record and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from luthier.strict import Strict


class QaConfig(Strict):
    """Learn to answer questions about a text."""

    type: Literal["qa"] = "qa"
    instruction: str = "Answer the question with a few words from the text."
    """What the model is told before the text; an empty text leaves it out."""
    no_answer: str = Field(default="unanswerable", min_length=1)
    """What the model writes where a row's `answers` are empty: the text does not say."""
    choices: list[str] | None = None
    """The only answers there are, as [yes, no, maybe]; replies are held to them. null leaves the reply free."""

    @field_validator("choices")
    @classmethod
    def _two_or_more(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(value) < 2 or len(set(value)) != len(value) or not all(map(str.strip, value))):
            raise ValueError("two or more different answers are needed")
        return value


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text, and its right answers, each of them right; none where the text does not say."""

    context: str
    question: str
    answers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"context": self.context, "question": self.question, "answers": list(self.answers)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Question:
        """The question that `to_json` wrote."""
        return cls(value["context"], value["question"], tuple(value["answers"]))
