"""Tool calls out of a reply that comes in pieces, wherever it is cut."""

from __future__ import annotations

import json

import pytest

from luthier.service.tool_calls import Piece, ToolCallReader

CALL = '<tool_call>{"name": "f", "arguments": {"x": "<b>"}}</tool_call>'


def read(text: str, size: int) -> list[Piece]:
    reader = ToolCallReader()
    pieces = [p for start in range(0, len(text), size) for p in reader.add(text[start : start + size])]
    return pieces + reader.finish()


def test_of_several_calls_one_alone_may_be_taken() -> None:
    reader = ToolCallReader(max_calls=1)
    pieces = [piece for char in "so " + CALL + CALL + " and more" for piece in reader.add(char)] + reader.finish()
    assert "".join(piece.text for piece in pieces) == "so "
    assert sum(piece.call is not None for piece in pieces) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
@pytest.mark.parametrize(
    ("text", "content", "num_calls"),
    [
        ("just text", "just text", 0),
        (CALL, "", 1),
        ("Let me see. " + CALL, "Let me see. ", 1),
        (CALL + "\n" + CALL, "", 2),
        (CALL.removesuffix("</tool_call>"), "", 1),
        ("a < b and <tool", "a < b and <tool", 0),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", 0),
        ("<tool_call>[1]</tool_call> x", "<tool_call>[1]</tool_call> x", 0),
        ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', 0),
    ],
)
def test_content_and_calls(text: str, content: str, num_calls: int, size: int) -> None:
    pieces = read(text, size)
    assert "".join(piece.text for piece in pieces) == content
    calls = [piece.call for piece in pieces if piece.call is not None]
    assert len(calls) == num_calls
    for call in calls:
        assert call["function"]["name"] == "f"
        assert json.loads(call["function"]["arguments"]) == {"x": "<b>"}
    assert len({call["id"] for call in calls}) == num_calls
