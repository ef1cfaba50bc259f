"""Preferences: the record (a prompt with two replies) and the task's options."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from luthier.strict import Strict


class PreferenceConfig(Strict):
    """Learn which of two replies is the better, by Direct Preference Optimization (arXiv:2305.18290)."""

    type: Literal["preference"] = "preference"
    beta: float = Field(default=0.1, gt=0, le=2, allow_inf_nan=False)
    """How strongly the model is held to what it said before training; smaller lets it go further."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, allow_inf_nan=False)
    """Share of the pairs that are taken to be labelled the wrong way round (conservative DPO)."""
    system: str | None = None
    """A system turn for prompts that have none; null leaves it to the model's own template."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A checked pair.

    Attributes:
        messages: The prompt: turns as in `luthier.tasks.chat.schema.Conversation`, the last a user's or a tool's. Its
            own assistant turns are read and not learnt.
        chosen, rejected: The better and the worse reply, an assistant's turn each; None in a row to predict for.
        tools: Function schemas, or None.
    """

    messages: tuple[Mapping[str, Any], ...]
    chosen: Mapping[str, Any] | None
    rejected: Mapping[str, Any] | None
    tools: tuple[Mapping[str, Any], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = {"messages": list(self.messages), "chosen": self.chosen, "rejected": self.rejected}
        if self.tools is not None:
            values["tools"] = list(self.tools)
        return copy.deepcopy(values)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preference:
        """The pair that `to_json` wrote."""
        tools = value.get("tools")
        return cls(
            tuple(value["messages"]), value["chosen"], value["rejected"], None if tools is None else tuple(tools)
        )
