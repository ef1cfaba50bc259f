"""A reply's text as it streams."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from luthier.engine.reply_text import ReplyText


def decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def stream(data: bytes, *stops: str) -> tuple[list[str], ReplyText]:
    reply = ReplyText(decode_bytes, stops)
    deltas = []
    for byte in data:
        deltas.append(reply.add(byte))
        if reply.is_stopped:
            break
    return [*deltas, reply.finish()], reply


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 👩‍🔧!", "", "𝄞"])
def test_characters_come_whole(text: str) -> None:
    deltas, reply = stream(text.encode())
    assert "".join(deltas) == reply.text == text
    assert all("\ufffd" not in delta for delta in deltas)


def test_a_character_that_never_ends_comes_at_the_end() -> None:
    deltas, reply = stream("ab€".encode()[:-1])
    assert deltas == ["a", "b", "", "", "\ufffd"]
    assert reply.text == "ab\ufffd"


def test_bytes_that_are_no_character_do_not_block_what_follows() -> None:
    _, reply = stream(b"a\xffbc")
    assert reply.text == "a\ufffdbc"


def test_a_possible_stop_string_is_held_back() -> None:
    deltas, reply = stream(b"one #, two ##x", "##END", "##x")
    assert deltas[4:6] == ["", "#,"]
    assert reply.is_stopped
    assert reply.text == "".join(deltas) == "one #, two "


def test_what_was_held_back_comes_when_the_reply_ends() -> None:
    deltas, reply = stream(b"ab##EN", "##END")
    assert deltas == ["a", "b", "", "", "", "", "##EN"]
    assert not reply.is_stopped
    assert reply.text == "ab##EN"


def test_the_first_of_several_stop_strings_wins() -> None:
    reply = ReplyText(lambda tokens: "".join("one STOP two END three"[token] for token in tokens), ("END", "STOP"))
    for token in range(22):
        reply.add(token)
        if reply.is_stopped:
            break
    assert reply.text == "one "


def test_stop_strings_within_one_token() -> None:
    words = ["Hello", " wor", "ld\nUser: hi\nUser:", "more"]
    reply = ReplyText(lambda tokens: "".join(words[token] for token in tokens), ("\nUser:",))
    assert [reply.add(token) for token in range(3)] == ["Hello", " wor", "ld"]
    assert reply.is_stopped
    assert reply.finish() == ""


def test_decoders_that_write_a_leading_space_only_in_company() -> None:
    words = ["\u2581The", "\u2581end", "ing"]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(words[token] for token in tokens).replace("\u2581", " ").removeprefix(" ")

    reply = ReplyText(decode, ())
    assert [reply.add(token) for token in (0, 1, 2, 0)] == ["The", " end", "ing", " The"]
