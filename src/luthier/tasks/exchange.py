"""One question and one answer, as tasks that write have them: a user's and an assistant's turn where the base has a
chat template, else a plain text and its continuation.

    chat:        the template around [user: question] [assistant: answer]; the answer and its end of turn carry loss
    completion:  question "\n\n" answer EOS; the answer and EOS carry loss
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.template import Renderer
from luthier.types import Prompt

Pair = tuple[str, str]
"""(question, answer)."""

SEPARATOR = "\n\n"
"""Between question and answer where there is no chat template."""

REASONING_ENDS = "</think>"


def sequence(
    question: str, answer: str, renderer: Renderer, system: str | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(tokens int32 [length], weights float32 [length]) of an exchange.

    Raises:
        RowError: where the chat template refuses it.
    """
    if renderer.can_chat:
        (found,) = renderer.chat_examples(messages([(question, answer)], system))
        return found
    text = _as_text(question, system)
    encoded = renderer.encode(text)
    ids = renderer.with_bos(encoded)
    reply = [*renderer.continuation(text, encoded, answer), renderer.require_eos_id()]
    tokens = np.asarray([*ids, *reply], dtype=np.int32)
    weights = np.zeros(tokens.shape, dtype=np.float32)
    weights[len(ids) :] = 1.0
    return tokens, weights


def prompt(
    question: str,
    reference: str,
    renderer: Renderer,
    *,
    system: str | None = None,
    shots: Sequence[Pair] = (),
    choices: Sequence[str] = (),
    row: int = 0,
) -> Prompt:
    """The question as it is asked; `shots` stand in front, answered.

    Args:
        reference: The answer that counts as right, as the model would write it.
        choices: The only answers there are.
    """
    if renderer.can_chat:
        turns = messages([*shots, (question, "")], system)[:-1]
        text = renderer.render_chat(turns, add_generation_prompt=True)
        ids = renderer.encode_rendered(text)
    else:
        text = _shown(question, system, shots)
        ids = renderer.with_bos(renderer.encode(text))
    written = as_written(question, choices, renderer, system=system, shots=shots) if choices else ()
    return Prompt(np.asarray(ids, dtype=np.int32), reference, text, row, written)


def as_written(
    question: str,
    answers: Sequence[str],
    renderer: Renderer,
    *,
    system: str | None = None,
    shots: Sequence[Pair] = (),
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each answer as the model learns to write it after `prompt`, its end included."""
    if renderer.can_chat:
        turns = [messages([*shots, (question, answer)], system) for answer in answers]
        return tuple(tuple(renderer.chat_turn(turn, len(turn) - 1).reply_ids) for turn in turns)
    text = _shown(question, system, shots)
    encoded = renderer.encode(text)
    return tuple((*renderer.continuation(text, encoded, answer), renderer.require_eos_id()) for answer in answers)


def answer_in(reply: str) -> str:
    """The answer in a reply, without the reasoning, mostly empty, that templates such as Qwen3's write before it."""
    return reply.rpartition(REASONING_ENDS)[2].strip()


def messages(pairs: Sequence[Pair], system: str | None) -> list[dict[str, Any]]:
    """The turns of a conversation of these exchanges."""
    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _shown(question: str, system: str | None, shots: Sequence[Pair]) -> str:
    """The plain text of a question, behind the `shots` and their answers."""
    return _as_text("".join(f"{q}{SEPARATOR}{a}{SEPARATOR}" for q, a in shots) + question, system)


def _as_text(question: str, system: str | None) -> str:
    return (f"{system}{SEPARATOR}" if system else "") + question + SEPARATOR
