"""Chat: the record (a conversation) and the task's options."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.strict import Strict


class ChatConfig(Strict):
    """Learn the assistant's turns of conversations."""

    type: Literal["chat"] = "chat"
    system: str | None = None
    """A system turn for conversations that have none; null leaves it to the model's own template."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A checked conversation.

    Attributes:
        messages: Turns in OpenAI's form. `content` is a text or absent; the arguments of `tool_calls` are objects; an
            assistant's turn may carry `weight` and `reasoning_content`. Not to be changed.
        tools: Function schemas, or None.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, in the form of a chat row."""
        tools = {} if self.tools is None else {"tools": copy.deepcopy(list(self.tools))}
        return {"messages": copy.deepcopy(list(self.messages)), **tools}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Conversation:
        """The conversation that `to_json` wrote."""
        tools = value.get("tools")
        return cls(tuple(value["messages"]), None if tools is None else tuple(tools))
