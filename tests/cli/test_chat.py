"""The conversation behind `luthier chat`, over a model that repeats what it hears."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from luthier.cli.chat import Conversation

Messages = list[dict[str, Any]]


class Echo:
    """Replies with the last turn; remembers what it was asked. Stops as by Ctrl-C where a turn says so."""

    def __init__(self, has_adapter: bool = True) -> None:
        self.has_adapter = has_adapter
        self.asked: list[tuple[bool, Messages, dict[str, Any]]] = []

    def reply(self, messages: Messages, *, base: bool = False, **options: Any) -> Iterator[str]:
        self.asked.append((base, messages, options))
        said = messages[-1]["content"]
        yield "plain " if base else "tuned "
        if said == "stop":
            raise KeyboardInterrupt
        yield said


def _converse(lines: list[str], session: Echo | None = None, **fields: Any) -> tuple[str, Echo, Conversation]:
    session = session or Echo()
    stream = io.StringIO()
    conversation = Conversation(session, Console(file=stream, width=40), {"temperature": 0.5}, **fields)
    remaining = iter(lines)

    def read_line() -> str:
        for line in remaining:
            return line
        raise EOFError

    conversation.run(read_line)
    return stream.getvalue(), session, conversation


def test_the_conversation_is_remembered_and_options_are_passed_on() -> None:
    text, session, _ = _converse(["one", "", "two"])
    assert text == "tuned one\ntuned two\n"
    _, messages, options = session.asked[-1]
    assert [turn["content"] for turn in messages] == ["one", "tuned one", "two"]
    assert options == {"temperature": 0.5}


def test_base_stands_beside_and_is_not_remembered() -> None:
    text, session, _ = _converse(["/base", "one", "/base", "two"])
    assert text == "base   plain one\ntuned  tuned one\ntuned two\n"
    assert [base for base, _, _ in session.asked] == [True, False, False]
    assert [turn["content"] for turn in session.asked[-1][1]] == ["one", "tuned one", "two"]


def test_a_base_alone_has_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    _, session, _ = _converse(["/base", "one"], Echo(has_adapter=False))
    assert [base for base, _, _ in session.asked] == [False]
    assert "no tuned model" in capsys.readouterr().err


def test_reset_keeps_the_system_turn() -> None:
    _, session, _ = _converse(["one", "/reset", "two"], system="Be brief.")
    assert session.asked[-1][1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]


def test_quit_ends_and_later_lines_are_left() -> None:
    text, _, _ = _converse(["one", "/quit", "two"])
    assert text == "tuned one\n"


def test_an_unknown_command_is_no_turn(capsys: pytest.CaptureFixture[str]) -> None:
    _, session, _ = _converse(["/rest"])
    assert session.asked == []
    assert "did you mean '/reset'?" in capsys.readouterr().err


def test_an_interrupt_ends_the_reply_and_not_the_chat() -> None:
    text, session, _ = _converse(["stop", "go on"])
    assert text == "tuned  [stopped]\ntuned go on\n"
    assert [turn["content"] for turn in session.asked[-1][1]] == ["stop", "tuned ", "go on"]


def test_replies_are_neither_wrapped_nor_read_as_markup() -> None:
    said = "[bold]" + "word " * 40 + "[/nothing]"
    text, _, _ = _converse([said])
    assert text == f"tuned {said}\n"
