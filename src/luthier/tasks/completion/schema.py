"""Completion: the record (a prompt and its continuation) and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.strict import Strict


class CompletionConfig(Strict):
    """Learn to continue a prompt, without any chat template."""

    type: Literal["completion"] = "completion"
    train_on_prompt: bool = False
    """Let the prompt carry loss too."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it, character for character: a space between them belongs to one of the two."""

    prompt: str
    completion: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"prompt": self.prompt, "completion": self.completion}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Completion:
        """The completion that `to_json` wrote."""
        return cls(value["prompt"], value["completion"])
