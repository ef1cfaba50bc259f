"""Classification: the record (a text and its label) and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator

from luthier.strict import Strict


class ClassificationConfig(Strict):
    """Learn to name the class of a text with a linear head on the hidden state of the text's last token."""

    type: Literal["classification"] = "classification"
    labels: list[str] | None = None
    """The classes in order; null takes those found in the training rows, sorted."""

    @field_validator("labels")
    @classmethod
    def _two_or_more(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(value) < 2 or len(set(value)) != len(value)):
            raise ValueError("two or more different labels are needed")
        return value


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and the name of its class."""

    text: str
    label: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"text": self.text, "label": self.label}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LabelledText:
        """The labelled text that `to_json` wrote."""
        return cls(value["text"], value["label"])
