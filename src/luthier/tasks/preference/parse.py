"""Checking a preference row, in OpenAI's form for DPO or in the plain one.

    {"input": {"messages": [...], "tools"?}, "preferred_output": [reply], "non_preferred_output": [reply]}
    {"prompt": text or turns, "chosen": reply, "rejected": reply, "system"?, "tools"?}
    {"chosen": turns, "rejected": turns}

A plain reply is a text, or a list of turns that ends with it; where it is a whole conversation, both begin alike, and
that beginning is the prompt. Keys beyond these are left out of the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.rows import RowError, preview
from luthier.errors import nearest
from luthier.tasks.chat.parse import check_order, parse_messages, parse_tools
from luthier.tasks.preference.schema import Preference
from luthier.tasks.shapes import require_text, unpack_json

Turns = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Names:
    """What the row calls its parts."""

    prompt: str
    chosen: str
    rejected: str


_OPENAI = _Names("input.messages", "preferred_output", "non_preferred_output")
_PLAIN = _Names("prompt", "chosen", "rejected")


def parse_preference(row: Mapping[str, Any], system: str | None = None, *, is_query: bool = False) -> Preference:
    """Check a row and make it a record.

    Args:
        row: A shaped row.
        system: The system turn for a prompt without one.
        is_query: The row is to be predicted for: the replies may be missing, and are left out.

    Raises:
        RowError: for a missing side, a wrong type, role or order of roles, or two sides that are the same.
    """
    if row.get("input") is not None:
        names, tools = _OPENAI, _input(row).get("tools")
        prompt = _turns(_input(row).get("messages"), names.prompt)
        chosen, rejected = (None, None) if is_query else (_output(row, names.chosen), _output(row, names.rejected))
    else:
        names, tools = _PLAIN, row.get("tools")
        prompt, chosen, rejected = _plain(row, is_query)
        own = row.get("system")
        system = system if own is None or own == "" else require_text(own, "system")
    _check_prompt(prompt, names.prompt)
    if system is not None and prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": system})
    if chosen is not None and chosen == rejected:
        raise RowError(
            names.rejected,
            f"is the same reply as {names.chosen}",
            "two replies that differ, the better and the worse",
            "take the row out: nothing can be learnt from it",
        )
    return Preference(tuple(prompt), chosen, rejected, parse_tools(tools))


def _input(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = unpack_json(row["input"])
    if not isinstance(found, Mapping):
        raise RowError("input", f"is {preview(found)}", 'an object {"messages": [...]}')
    if found.get("messages") is None:
        hint = nearest("messages", map(str, found))
        raise RowError("input.messages", f"is missing{hint}", "the turns before the reply")
    return found


def _turns(value: Any, name: str) -> Turns:
    value = unpack_json(value)
    if not isinstance(value, list | tuple):
        raise RowError(name, f"is {preview(value)}", "a list of {role, content} objects")
    if not value:
        raise RowError(name, "is an empty list", "at least one turn", kind="empty")
    turns = parse_messages(value, name)
    for turn in turns:
        turn.pop("weight", None)  # what counts here is which of the two replies is better
    return turns


def _output(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    turns = _turns(row.get(name), name)
    if len(turns) != 1:
        raise RowError(
            name, f"holds {len(turns)} turns", "one assistant turn", "put the turns before it into the input"
        )
    return _reply(turns, name)


def _reply(turns: Turns, name: str) -> dict[str, Any]:
    if turns[-1]["role"] != "assistant":
        raise RowError(
            f"{name}[{len(turns) - 1}].role", f"is {turns[-1]['role']!r}", "assistant: the reply that is judged"
        )
    return turns[-1]


def _plain(row: Mapping[str, Any], is_query: bool) -> tuple[Turns, dict[str, Any] | None, dict[str, Any] | None]:
    prompt = _plain_prompt(row.get("prompt"))
    if is_query:
        if prompt is None:
            raise RowError("prompt", "is missing", "a text, or a list of {role, content} objects")
        return prompt, None, None
    before, chosen = _plain_side(row.get("chosen"), "chosen")
    other, rejected = _plain_side(row.get("rejected"), "rejected")
    if before != other:
        raise RowError(
            "rejected",
            "does not begin as `chosen` does",
            "two conversations that differ in their last turn alone",
            "let both sides hold the same turns before the reply",
        )
    if not before and prompt is None:
        raise RowError(
            "prompt",
            "is missing",
            "a text or a list of turns; or whole conversations in `chosen` and `rejected`",
            "add the column, or map another onto it with `data.fields`",
        )
    if before and prompt is not None and not _agree(prompt, before):
        raise RowError(
            "prompt",
            "is not what `chosen` and `rejected` hold before their last turn",
            "the same turns, or the text of a user's turn among them",
            "leave the prompt out, or the turns before the reply",
        )
    return before or prompt or [], chosen, rejected


def _agree(prompt: Turns, before: Turns) -> bool:
    """Whether a prompt repeats what whole conversations hold anyway, as public sets often do."""
    if prompt == before:
        return True
    return len(prompt) == 1 and prompt[0] in [turn for turn in before if turn["role"] == "user"]


def _plain_prompt(value: Any) -> Turns | None:
    value = unpack_json(value)
    if value is None:
        return None
    if isinstance(value, str):
        return [{"role": "user", "content": require_text(value, "prompt")}]
    return _turns(value, "prompt")


def _plain_side(value: Any, name: str) -> tuple[Turns, dict[str, Any]]:
    """The turns before the reply, and the reply."""
    value = unpack_json(value)
    if isinstance(value, str):
        return [], {"role": "assistant", "content": require_text(value, name)}
    turns = _turns(value, name)
    return turns[:-1], _reply(turns, name)


def _check_prompt(prompt: Sequence[Mapping[str, Any]], name: str) -> None:
    check_order(prompt, name)
    last = prompt[-1]["role"]
    if last not in ("user", "tool"):
        raise RowError(
            f"{name}[{len(prompt) - 1}].role",
            f"is {last!r}, and the reply comes next",
            "a prompt that ends with a user's turn, or a tool's",
        )
