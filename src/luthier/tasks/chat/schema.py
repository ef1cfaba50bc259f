"""Chat: the record (a conversation) and the task's options."""

from __future__ import annotations

from typing import Literal

from luthier.strict import Strict


class ChatConfig(Strict):
    """Learn the assistant's turns of conversations."""

    type: Literal["chat"] = "chat"
    system: str | None = None
    """A system turn for conversations that have none; null leaves it to the model's own template."""
