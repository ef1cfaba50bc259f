"""The seam for a content filter, and one plain implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ContentFilter(Protocol):
    """Looks at prompts before they are answered, and at replies as they grow."""

    def problem(self, text: str) -> str | None:
        """Why this text is not let through, or None. Called with a whole prompt, or a reply so far."""


class WordFilter:
    """Refuses texts that hold one of some words, whatever their case."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(word.strip().lower() for word in words if word.strip())

    def problem(self, text: str) -> str | None:
        lowered = text.lower() if self._words else ""
        return "The text holds a word that is not let through." if any(w in lowered for w in self._words) else None
