"""Text: the record (a document) and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.strict import Strict


class TextConfig(Strict):
    """Learn to continue documents: domain adaptation."""

    type: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class Document:
    """A text to learn from its first to its last word."""

    text: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"text": self.text}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Document:
        """The document that `to_json` wrote."""
        return cls(value["text"])
