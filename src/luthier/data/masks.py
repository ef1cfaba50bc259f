"""Which tokens of a conversation carry loss, found by rendering it turn by turn, for any chat template.

For every assistant's turn k that has a weight:

    prompt_k = render(messages[:k], add_generation_prompt=True)        what a served model is given
    whole_k  = render(messages[: k + 1])
    reply_k  = what whole_k adds to prompt_k, up to and with the end of turn   what it is to write

The sequence of turn k is tokens(prompt_k) + tokens(reply_k), where the prompt is tokenized alone, as in serving. Where
the sequence of an earlier turn is the beginning of a later turn's, both are trained as one sequence. Where it is not,
because the template rewrites earlier turns (Qwen3 drops their reasoning) or a token would straddle the border, the
earlier turn is a sequence of its own. So in every sequence the tokens before a supervised reply are those of serving.

The end of turn is always supervised; what a template writes after it (a newline, a closing EOS) never is. A template
that writes no end of turn is given EOS there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.rows import RowError, preview

if TYPE_CHECKING:
    from luthier.data.template import Messages, Renderer, Tools

_THINK = "<think>"


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant's turn, as it is served.

    Attributes:
        prompt: All text that stands before the reply.
        reply: The reply with its end of turn.
        prompt_ids: Tokens of the prompt, tokenized alone.
        reply_ids: Tokens of the reply, the last being the end of turn.
        weight: Loss weight of every token of the reply.
    """

    prompt: str
    reply: str
    prompt_ids: list[int]
    reply_ids: list[int]
    weight: float = 1.0

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.reply_ids


def chat_examples(
    renderer: Renderer, messages: Messages, tools: Tools
) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """The conversation as (tokens int32 [length], weights float32 [length]) pairs; see the top of this file.

    Raises:
        RowError: where the template refuses the conversation, or leaves a reply out of what it writes.
    """
    supervised = [k for k, message in enumerate(messages) if _weight(message) > 0]
    groups: list[list[Turn]] = []
    for k in reversed(supervised):
        turn = turn_at(renderer, messages, k, tools)
        home = next((group for group in groups if _begins_with(group[0], turn)), None)
        if home is None:
            groups.append([turn])
        else:
            home.append(turn)
    return [_weighted(group) for group in reversed(groups)]


def turn_at(renderer: Renderer, messages: Messages, k: int, tools: Tools) -> Turn:
    """The assistant's turn `messages[k]` as prompt and reply.

    Raises:
        RowError: where the template refuses the conversation up to here, or leaves the reply out of what it writes.
    """
    prompt = renderer.render_chat(messages[:k], tools, add_generation_prompt=True)
    whole = renderer.render_chat(messages[: k + 1], tools)
    if whole.startswith(prompt):
        written = whole[len(prompt) :]
    else:
        written = _after_other_prompt(renderer, messages, k, tools, prompt, whole)
    reply = _until_end_of_turn(renderer, written, messages[k], k)
    prompt_ids = renderer.encode_rendered(prompt)
    return Turn(prompt, reply, prompt_ids, renderer.continuation(prompt, prompt_ids, reply), _weight(messages[k]))


def _weight(message: Mapping[str, Any]) -> float:
    if message.get("role") != "assistant":
        return 0.0
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _begins_with(later: Turn, earlier: Turn) -> bool:
    ids = earlier.ids
    return later.prompt_ids[: len(ids)] == ids


def _weighted(group: list[Turn]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    tokens = np.asarray(group[0].ids, dtype=np.int32)
    weights = np.zeros(tokens.shape, dtype=np.float32)
    for turn in group:
        weights[len(turn.prompt_ids) : len(turn.prompt_ids) + len(turn.reply_ids)] = turn.weight
    weights[:1] = 0.0  # nothing stands before the first token to predict it from
    return tokens, weights


def _after_other_prompt(renderer: Renderer, messages: Messages, k: int, tools: Tools, prompt: str, whole: str) -> str:
    """The reply as written, where the template writes one text before a reply that is there, another before one due.

    Mistral writes the system text with the *last* user turn only while the reply is to come: the end of the prompt, its
    header, is then found again in the whole, and the reply follows it. DeepSeek-R1 opens `<think>` only while the reply
    is to come: there is nothing to find, and the reply is the message's own content.
    """
    bare = renderer.render_chat(messages[:k], tools)
    header = prompt[len(bare) :] if prompt.startswith(bare) else ""
    # Without a header to recognize, the last user's words and what follows them must serve.
    anchor = header or prompt[_last_words(prompt, messages[:k]) :]
    position = whole.rfind(anchor, 0, _reply_start(whole, messages[k])) if anchor else -1
    if position >= 0:
        return whole[position + len(anchor) :]
    content = _content(messages[k])
    if not content or messages[k].get("tool_calls"):
        raise _left_out(k, "the base's chat template writes this turn in a way that no prompt leads to")
    if prompt.rstrip().endswith(_THINK):
        content = content.lstrip().removeprefix(_THINK).removeprefix("\n")
    return content


def _last_words(prompt: str, messages: Messages) -> int:
    content = _content(messages[-1]).strip() if messages else ""
    found = prompt.rfind(content) if content else -1
    return found if found >= 0 else len(prompt)


def _reply_start(whole: str, message: Mapping[str, Any]) -> int:
    """Where the reply's own words begin in the whole; its end where they are not found."""
    content = _content(message).strip()
    found = whole.rfind(content) if content else -1
    return found if found >= 0 else len(whole)


def _until_end_of_turn(renderer: Renderer, written: str, message: Mapping[str, Any], k: int) -> str:
    """Cut `written` after its end of turn, or put EOS there where the template writes none."""
    stops = "|".join(re.escape(text) for text in sorted(renderer.stop_texts, key=len, reverse=True))
    closing = re.search(rf"(?P<first>{stops})(?:\s|{stops})*\Z", written) if stops else None
    body = written[: closing.start()] if closing else written
    _check_written(renderer, message, body, stops, k)
    if closing:
        return body + closing.group("first")
    if renderer.end_of_turn is None:
        renderer.require_eos_id()
    if not _content(message)[-1:].isspace():
        body = body.rstrip()  # what separates turns is no part of the reply
    return body + (renderer.end_of_turn or "")


def _check_written(renderer: Renderer, message: Mapping[str, Any], body: str, stops: str, k: int) -> None:
    """A reply that the template passed over, or that would stop in its middle, must not be trained on in silence."""
    content = _content(message)
    for call in message.get("tool_calls") or []:
        name = call["function"]["name"]
        if name not in body:
            raise _left_out(
                k, f"the base's chat template does not write the call of {name!r}", "give the row its `tools`"
            )
    if content.strip() and not body.strip():
        raise _left_out(k, f"the base's chat template writes nothing for {preview(content)}")
    inside = re.search(stops, content.rstrip()) if stops else None
    if inside and not content.rstrip().endswith(inside.group()):
        raise RowError(
            f"messages[{k}].content",
            f"the reply holds {inside.group()!r}, at which a served model stops",
            "a reply without the base's end-of-turn tokens inside",
            "take the token out of the text",
        )


def _left_out(k: int, found: str, fix: str = "choose a base whose template writes such turns") -> RowError:
    return RowError(f"messages[{k}]", found, "a turn that the template writes", fix, kind="template")
