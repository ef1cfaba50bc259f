"""Chat: a conversation becomes sequences whose assistant turns carry loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.template import Renderer
from luthier.tasks.chat.parse import parse_conversation, parse_open_conversation
from luthier.tasks.chat.schema import ChatConfig, Conversation
from luthier.tasks.defaults import WithoutClasses, Writes
from luthier.tasks.fit import fit
from luthier.tasks.task import Truncation
from luthier.types import Example, Objective, Prompt


@dataclass(frozen=True)
class ChatTask(WithoutClasses, Writes):
    """`task: chat`. See `luthier.tasks.task.Task` for the verbs and `luthier.data.masks` for where loss lies."""

    config: ChatConfig = field(default_factory=ChatConfig)
    name: str = "chat"
    objective: Objective = "language_modelling"
    generates: bool = True

    def parse(self, row: Mapping[str, Any]) -> Conversation:
        return parse_conversation(row, self.config.system)

    def parse_query(self, row: Mapping[str, Any]) -> Conversation:
        """A conversation to go on with. Its last assistant turns are taken off: they are the answer."""
        return parse_open_conversation(row, self.config.system)

    def from_json(self, value: Mapping[str, Any]) -> Conversation:
        return Conversation.from_json(value)

    def examples(
        self, record: Conversation, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example a conversation; one an assistant turn where the template rewrites earlier turns.

        Each is fitted to `max_length` by itself. One that loses all its labels is left out; where none remains, the row
        is refused.
        """
        sequences = renderer.chat_examples(record.messages, record.tools)
        return fit(sequences, renderer, max_length, truncation, row)

    def prompts(
        self, record: Conversation, renderer: Renderer, shots: Sequence[Conversation] = (), row: int = 0
    ) -> list[Prompt]:
        """The conversation up to its last assistant turn with a weight, or all of it where there is none; `shots` stand
        in front as earlier turns.

        The shots' system turns and tools are left out: the record's own hold for all.
        """
        judged = [k for k, m in enumerate(record.messages) if m["role"] == "assistant" and m.get("weight", 1.0) > 0]
        last = judged[-1] if judged else len(record.messages)
        shown = [message for shot in shots for message in _solved(shot)]
        first = 1 if record.messages[0]["role"] == "system" else 0
        messages = [*record.messages[:first], *shown, *record.messages[first : last + 1]]
        if not judged:
            text = renderer.render_chat(messages, record.tools, add_generation_prompt=True)
            return [Prompt(np.asarray(renderer.encode_rendered(text), dtype=np.int32), "", text, row)]
        turn = renderer.chat_turn(messages, len(messages) - 1, record.tools)
        tokens = np.asarray(turn.prompt_ids, dtype=np.int32)
        return [Prompt(tokens, renderer.decode(turn.reply_ids), turn.prompt, row)]

    def present(self, record: Conversation, prediction: str) -> dict[str, Any]:
        return {"reply": prediction}


def _solved(shot: Conversation) -> list[Mapping[str, Any]]:
    """A conversation's turns without system turn, up to its last reply, so that no open question meets the next."""
    last = max(k for k, message in enumerate(shot.messages) if message["role"] == "assistant")
    return [message for message in shot.messages[: last + 1] if message["role"] != "system"]
