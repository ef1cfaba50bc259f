"""Tagging: the record (a text, its words and the entities in it) and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator

from luthier.strict import Strict


class TaggingConfig(Strict):
    """Learn to find entities with a head on the hidden state of each word's last token."""

    type: Literal["tagging"] = "tagging"
    labels: list[str] | None = None
    """The types of entities in order; null takes those found in the training rows, sorted."""
    reads: Literal["auto", "once", "twice"] = "auto"
    """Let the model read the text once, or once more before the tags are read, so that each word is seen with what
    follows it (Springer et al. 2024, arXiv:2402.15449); twice costs twice the tokens. `auto`: twice, and once on an
    encoder, which sees what follows by itself."""

    @field_validator("labels")
    @classmethod
    def _named_once(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (not value or len(set(value)) != len(value) or not all(map(str.strip, value))):
            raise ValueError("one or more different types are needed")
        return value


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text, and the type of what stands there."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class TaggedText:
    """A text with its entities.

    Attributes:
        text: The whole text.
        words: Characters [start, end) of each word, in order; a word has one tag.
        spans: The entities: in order, none over another, each of whole words.
    """

    text: str
    words: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "text": self.text,
            "words": [list(word) for word in self.words],
            "spans": [[span.start, span.end, span.label] for span in self.spans],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaggedText:
        """The text that `to_json` wrote."""
        words = tuple((start, end) for start, end in value["words"])
        return cls(value["text"], words, tuple(Span(*span) for span in value["spans"]))


@dataclass(frozen=True, slots=True)
class Tags:
    """A prediction: the tag of each word, and how probable the head holds it."""

    tags: tuple[str, ...]
    probabilities: tuple[float, ...]
