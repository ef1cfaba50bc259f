"""Checking a chat row: OpenAI's fine-tuning form, turn by turn.

Keys beyond OpenAI's (ids, time stamps) are left out of the record, unless they look like a misspelt one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from luthier.data.chat_template import REASONING_FIELDS
from luthier.data.rows import RowError, preview
from luthier.errors import nearest
from luthier.tasks.chat.schema import Conversation
from luthier.tasks.shapes import unpack_json

ROLES = ("system", "user", "assistant", "tool")
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3
"""Bounds of a weight above 0: only ratios count, and float32 sums lose what lies further apart."""

_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", *REASONING_FIELDS)


def parse_conversation(row: Mapping[str, Any], system: str | None = None) -> Conversation:
    """Check a row {messages, tools?} and make it a conversation.

    Args:
        row: A shaped row.
        system: The system turn for a conversation without one.

    Raises:
        RowError: for a wrong type, role or order of roles, an empty turn, or a conversation with nothing to learn from.
    """
    turns = unpack_json(row.get("messages"))
    if not _is_list(turns):
        raise RowError("messages", f"is {preview(turns)}", "a list of {role, content} objects")
    if not turns:
        raise RowError("messages", "is an empty list", "at least a user's and an assistant's turn", kind="empty")
    messages = [_parse_message(turn, f"messages[{i}]") for i, turn in enumerate(turns)]
    check_order(messages)
    if not any(message["role"] == "assistant" and message.get("weight", 1.0) > 0 for message in messages):
        raise RowError(
            "messages",
            "no assistant turn has a weight above 0"
            if any(message["role"] == "assistant" for message in messages)
            else "there is no assistant turn",
            "at least one assistant turn to learn from",
            "add the reply that the model should give, or take the row out",
            kind="empty",
        )
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), parse_tools(row.get("tools")))


def parse_open_conversation(row: Mapping[str, Any], system: str | None = None) -> Conversation:
    """Check a row {messages, tools?} that is to be gone on with; what the assistant says at its end is taken off.

    Raises:
        RowError: as `parse_conversation`, but a reply may be missing.
    """
    turns = unpack_json(row.get("messages"))
    if not _is_list(turns):
        raise RowError("messages", f"is {preview(turns)}", "a list of {role, content} objects")
    messages = parse_messages(turns)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise RowError("messages", "there is nothing to reply to", "a user's turn", kind="empty")
    check_order(messages)
    for message in messages:
        if message["role"] == "assistant":
            message["weight"] = 0.0
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), parse_tools(row.get("tools")))


def parse_messages(turns: Sequence[Any], name: str = "messages") -> list[dict[str, Any]]:
    """Check the turns of a conversation that is to be gone on with; it need not end with a reply.

    Args:
        name: What the row calls them.

    Raises:
        RowError: for a wrong type or role, or an empty turn.
    """
    return [_parse_message(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]


def _parse_message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError(where, f"is {preview(turn)}", "an object {role, content}")
    for key, value in turn.items():
        if value is not None and key not in _KEYS and (hint := nearest(str(key), _KEYS)):
            raise RowError(
                f"{where}.{key}", f"is not a key of a message{hint}", ", ".join(_KEYS), "correct its spelling"
            )
    role = _parse_role(turn, where)
    message: dict[str, Any] = {"role": role}
    calls = _parse_calls(unpack_json(turn.get("tool_calls")), where)
    if calls and role != "assistant":
        raise RowError(
            f"{where}.tool_calls", f"stands in a turn of role {role!r}", "tool calls in assistant turns only"
        )
    content = _parse_content(turn, where, may_be_absent=bool(calls))
    if content is not None:
        message["content"] = content
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = _text(turn[key], f"{where}.{key}")
    reasoning = next((turn[key] for key in REASONING_FIELDS if turn.get(key) is not None), None)
    if reasoning is not None and role == "assistant":
        message[REASONING_FIELDS[0]] = _text(reasoning, f"{where}.{REASONING_FIELDS[0]}")
    if turn.get("weight") is not None:
        message["weight"] = _parse_weight(turn["weight"], role, f"{where}.weight")
    return message


def _parse_role(turn: Mapping[str, Any], where: str) -> str:
    role = turn.get("role")
    if role is None:
        hint = nearest("role", map(str, turn))
        raise RowError(f"{where}.role", f"is missing{hint}", f"one of {', '.join(ROLES)}")
    role = "system" if role == "developer" else role  # OpenAI's newer name for the same turn
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"{where}.role", f"is {preview(role)}{hint}", f"one of {', '.join(ROLES)}")
    return str(role)


def _parse_content(turn: Mapping[str, Any], where: str, may_be_absent: bool) -> str | None:
    content = turn.get("content")
    if _is_list(content):
        content = "".join(_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if content is None and not may_be_absent:
        hint = "" if "content" in turn else nearest("content", (str(key) for key in turn if key != "role"))
        raise RowError(
            f"{where}.content",
            f"{'is null' if 'content' in turn else 'is missing'}{hint}",
            "a text, or null in an assistant turn with tool_calls",
            kind="empty" if "content" in turn else "schema",
        )
    if content is None:
        return None
    text = _text(content, f"{where}.content")
    if not text.strip() and not may_be_absent and turn.get("role") != "tool":
        raise RowError(f"{where}.content", "is empty", "some text", "fill it in, or take the row out", kind="empty")
    return text


def _parse_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowError(where, f"is {preview(part)}", 'a part {"type": "text", "text": "..."}', "keep the text parts alone")


def _parse_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not _is_list(calls):
        raise RowError(f"{where}.tool_calls", f"is {preview(calls)}", "a list of calls")
    return [_parse_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(
            where, f"is {preview(call)}", '{"type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # OpenAI writes arguments as JSON text. Templates expect the object, and would quote the text once more.
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            found = f"is not valid JSON ({error}): {preview(function['arguments'])}"
            raise RowError(f"{where}.function.arguments", found, "a JSON object as text") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RowError(f"{where}.function.arguments", f"is {preview(arguments)}", "a JSON object")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    return parsed if call.get("id") is None else {"id": _text(call["id"], f"{where}.id"), **parsed}


def _parse_weight(weight: Any, role: str, where: str) -> float:
    if role != "assistant":
        raise RowError(where, f"stands in a turn of role {role!r}", "a weight on assistant turns only", "take it out")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or MIN_WEIGHT <= weight <= MAX_WEIGHT):
        expected = f"0 for no loss, 1 for the usual one, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:,.0f}"
        raise RowError(where, f"is {preview(weight)}", expected)
    return float(weight)


def parse_tools(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    """Check a row's function schemas; None where it has none.

    Raises:
        RowError: for anything else.
    """
    tools = unpack_json(tools)
    if tools is None or (_is_list(tools) and not tools) or tools == "":
        return None
    if not _is_list(tools):
        raise RowError("tools", f"is {preview(tools)}", "a list of function schemas")
    return tuple(_parse_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def _parse_tool(tool: Any, where: str) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]:
            return tool if "function" in tool else {"type": "function", "function": tool}
    raise RowError(where, f"is {preview(tool)}", '{"type": "function", "function": {"name": ..., "parameters": {...}}}')


def check_order(messages: Sequence[Mapping[str, Any]], name: str = "messages") -> None:
    """Refuse turns that do not follow one another as in a conversation.

    Args:
        name: What the row calls them.

    Raises:
        RowError: naming the first turn that is out of order.
    """
    before: Mapping[str, Any] = {"role": None}
    for i, message in enumerate(messages):
        problem = _order_problem(i, message["role"], before)
        if problem:
            roles = ", ".join(m["role"] for m in messages[: i + 1])
            raise RowError(
                f"{name}[{i}].role",
                f"{problem} (the turns so far: {roles})",
                "an optional system turn first, then user and assistant in turns; tool after an assistant's tool_calls",
                "put the turns in order, or join neighbours of one role",
            )
        before = message


def _order_problem(i: int, role: str, before: Mapping[str, Any]) -> str | None:
    last = before["role"]
    if role == "system":
        return f"a system turn stands at place {i + 1}" if i > 0 else None
    if role == "assistant":
        if last in (None, "system"):
            return "an assistant turn comes before any user turn"
        return "two assistant turns stand in a row" if last == "assistant" else None
    if role == "user":
        return "two user turns stand in a row" if last == "user" else None
    if last == "tool" or before.get("tool_calls"):
        return None
    return "a tool turn follows no tool call"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(where, f"is {preview(value)}", "a text")
    return value


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)
