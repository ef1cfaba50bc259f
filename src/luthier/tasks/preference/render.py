"""Preferences: a prompt with two replies becomes one example of two sequences, whose prompts are the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.chat.render import ChatTask
from luthier.tasks.chat.schema import Conversation
from luthier.tasks.defaults import WithoutClasses, Writes
from luthier.tasks.fit import too_long
from luthier.tasks.preference.parse import parse_preference
from luthier.tasks.preference.schema import Preference, PreferenceConfig
from luthier.tasks.task import Marks, Truncation
from luthier.types import Example, Objective, Pair, Prompt

Ids = list[int]


@dataclass(frozen=True)
class PreferenceTask(WithoutClasses, Writes):
    """`task: preference`. See `luthier.tasks.task.Task` for the verbs."""

    config: PreferenceConfig = field(default_factory=PreferenceConfig)
    name: str = "preference"
    objective: Objective = "preference"
    generates: bool = True

    def parse(self, row: Mapping[str, Any]) -> Preference:
        return parse_preference(row, self.config.system)

    def parse_query(self, row: Mapping[str, Any]) -> Preference:
        return parse_preference(row, self.config.system, is_query=True)

    def from_json(self, value: Mapping[str, Any]) -> Preference:
        return Preference.from_json(value)

    def examples(
        self, record: Preference, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example, the chosen side before the rejected one; replies and their ends count.

        `max_length` is that of a side. A pair with a longer side is left out as a whole, or refused, or cut: "end" cuts
        the replies, "start" the prompt, equally on both sides. It is refused where that would leave a side without
        prompt or reply, or two sides that are the same.
        """
        before = len(record.messages)
        sides = [
            renderer.chat_turn([*record.messages, reply], before, record.tools)
            for reply in (record.chosen, record.rejected)
            if reply is not None
        ]
        prompt, replies = sides[0].prompt_ids, [side.reply_ids for side in sides]
        longest = len(prompt) + max(map(len, replies))
        if longest > max_length:
            if truncation == "error":
                raise too_long(longest, max_length)
            if truncation == "drop":
                return []
            prompt, replies = _cut(prompt, replies, renderer.bos_id, max_length, truncation)
        if replies[0] == replies[1]:
            raise _same_sides(longest, max_length)
        tokens = np.asarray([id for reply in replies for id in (*prompt, *reply)], dtype=np.int32)
        weights = np.concatenate([np.repeat([0.0, 1.0], [len(prompt), len(reply)]) for reply in replies])
        pair = Pair(len(prompt) + len(replies[0]), self.config.beta, self.config.label_smoothing)
        return [Example(tokens, weights.astype(np.float32), row=row, pair=pair)]

    def prompts(
        self, record: Preference, renderer: Renderer, shots: Sequence[Preference] = (), row: int = 0
    ) -> list[Prompt]:
        """The prompt, and the chosen reply for comparison; `shots` stand in front with theirs."""
        return ChatTask().prompts(_conversation(record), renderer, [_conversation(shot) for shot in shots], row)

    def mark(self, record: Preference, prediction: str, reference: str = "") -> Marks:
        """What was written stands beside the chosen reply; there is no right and wrong in it."""
        return Marks(prediction, reference)

    def present(self, record: Preference, prediction: str) -> dict[str, Any]:
        return {"reply": prediction}


def _conversation(record: Preference) -> Conversation:
    """The prompt and the better reply, which alone is asked for."""
    prompt = [{**turn, "weight": 0.0} if turn["role"] == "assistant" else turn for turn in record.messages]
    reply = () if record.chosen is None else (record.chosen,)
    return Conversation((*prompt, *reply), record.tools)


def _cut(
    prompt: Ids, replies: list[Ids], bos_id: int | None, max_length: int, truncation: Truncation
) -> tuple[Ids, list[Ids]]:
    """Prompt and replies with neither side above `max_length`."""
    longest = len(prompt) + max(map(len, replies))
    if truncation == "start":
        keep_bos = prompt[:1] == [bos_id]
        prompt = prompt[: int(keep_bos)] + prompt[longest - max_length + int(keep_bos) :]
        replies = replies if len(prompt) + max(map(len, replies)) <= max_length else [[], []]
    else:
        replies = [reply[: max(0, max_length - len(prompt))] for reply in replies]
    if not prompt or not all(replies):
        raise RowError(
            "",
            f"the longer side has {longest} tokens, and cutting it to {max_length} leaves "
            + ("no prompt" if truncation == "start" else "no reply"),
            "room for prompt and reply within train.max_length",
            "raise train.max_length, or shorten the row",
            kind="truncated",
        )
    return prompt, replies


def _same_sides(longest: int, max_length: int) -> RowError:
    if longest > max_length:
        return RowError(
            "",
            f"the longer side has {longest} tokens, and the first {max_length} of both sides are the same",
            "two replies that differ within train.max_length",
            "raise train.max_length, or set train.truncation to start or drop",
            kind="truncated",
        )
    return RowError(
        "",
        "the base's chat template writes both replies alike",
        "two replies that differ in more than white space",
        "take the row out: nothing can be learnt from it",
        kind="template",
    )
