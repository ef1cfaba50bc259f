"""Tool calls out of a reply's text, as it streams: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

That is how the renderer writes calls into a prompt, for models of their own accord (Qwen) and through the template that
Luthier gives to models that know no tools. What does not parse stays text.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is certain to be content, or a whole call."""

    text: str = ""
    call: dict[str, Any] | None = None


class ToolCallReader:
    """Takes a reply's text in pieces and gives content and calls, in order.

    Args:
        max_calls: What follows so many calls is left out; None takes all.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self._held = ""
        self._max_calls = max_calls
        self.num_calls = 0

    def add(self, text: str) -> list[Piece]:
        """The pieces that became certain."""
        self._held += text
        pieces: list[Piece] = []
        while not self._is_full:
            begin = self._held.find(BEGIN)
            if begin < 0:
                kept = _overlap(self._held, BEGIN)
                pieces += _content(self._held[: len(self._held) - kept], self.num_calls)
                self._held = self._held[len(self._held) - kept :]
                return pieces
            end = self._held.find(END, begin)
            if end < 0:
                pieces += _content(self._held[:begin], self.num_calls)
                self._held = self._held[begin:]
                return pieces
            pieces += _content(self._held[:begin], self.num_calls)
            inside = self._held[begin + len(BEGIN) : end]
            self._held = self._held[end + len(END) :]
            pieces.append(self._read(inside))
        return pieces

    @property
    def _is_full(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def finish(self) -> list[Piece]:
        """What is left when the reply is over: a call whose end is missing counts if it is whole."""
        rest, self._held = self._held if not self._is_full else "", ""
        if rest.startswith(BEGIN):
            piece = self._read(rest.removeprefix(BEGIN))
            return [piece] if piece.call is not None else _content(rest, 0)
        return _content(rest, self.num_calls)

    def _read(self, inside: str) -> Piece:
        try:
            value = json.loads(inside)
            name, arguments = value["name"], value.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            return Piece(text=BEGIN + inside + END)
        if not isinstance(name, str):
            return Piece(text=BEGIN + inside + END)
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        call = {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": text},
        }
        return Piece(call=call)


def _content(text: str, num_calls: int) -> list[Piece]:
    # Between and behind calls only white space is usual; it belongs to nobody.
    return [Piece(text=text)] if text and not (num_calls and not text.strip()) else []


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
