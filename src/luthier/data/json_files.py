"""JSON Lines and JSON arrays -> rows, one at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from luthier.data.lines import BYTE_ORDER_MARK, MAX_ROW_BYTES, LineProblem, Row, decode, invalid_utf8, physical_lines
from luthier.errors import DataError

CHUNK_BYTES = 1 << 18
_SPACE = " \t\r\n"


def read_json_lines(stream: BinaryIO) -> Iterator[Row | LineProblem]:
    """One object a line; blank lines are passed over and still counted."""
    for raw in physical_lines(stream):
        text = decode(raw)
        if isinstance(text, LineProblem):
            yield text
        elif text.strip():
            yield _parse_line(raw.number, text)


def read_json(stream: BinaryIO, name: str) -> Iterator[Row | LineProblem]:
    """The objects of one array, streamed; or one object a line, where the file begins with an object.

    Raises:
        DataError: when the top level is neither.
    """
    head = stream.read(4096)
    stream.seek(0)
    opening = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if opening == b"[":
        return _read_array(stream)
    if opening == b"{" and _first_line_is_an_object(stream):
        return read_json_lines(stream)
    raise DataError(
        f"{name} holds {'one JSON object' if opening == b'{' else 'no JSON array'} at its top level",
        "an array of objects, [{...}, {...}], or one object a line",
        "keep only the list of rows, or write one object a line and name the file .jsonl",
    )


def _first_line_is_an_object(stream: BinaryIO) -> bool:
    first = stream.readline(MAX_ROW_BYTES).removeprefix(BYTE_ORDER_MARK)
    while first and not first.strip():
        first = stream.readline(MAX_ROW_BYTES)
    stream.seek(0)
    # A line that ends as an object does is meant as one, even if it turns out to be broken.
    return first.rstrip().endswith(b"}")


def _parse_line(line: int, text: str) -> Row | LineProblem:
    try:
        values = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if "\r" in text:
            return _bare_carriage_returns(line)
        return broken_json(line, error.colno, _reason(error))
    except (ValueError, RecursionError) as error:
        return broken_json(line, None, _reason(error))
    return _row(line, values, f"line {line}", may_hide_surrogates="\\ud" in text or "\\uD" in text)


def _row(line: int, values: Any, place: str, may_hide_surrogates: bool) -> Row | LineProblem:
    if not isinstance(values, dict):
        return LineProblem(
            line,
            f"a JSON {_kind_name(values)}",
            'a JSON object such as {"prompt": "...", "completion": "..."}',
            "write each row as an object with named fields",
            kind="not_an_object",
            place=place,
        )
    if may_hide_surrogates and not _encodes(values):
        return LineProblem(
            line,
            "an escape such as \\ud83d that is half of a character",
            "both halves of a surrogate pair",
            "the text was cut in the middle of a character when it was written; mend or leave out the row",
            kind="half_character",
            place=place,
        )
    return Row(line, values, place)


def broken_json(line: int, column: int | None, reason: str, place: str = "") -> LineProblem:
    where = f" at column {column}" if column else ""
    return LineProblem(
        line,
        f"broken JSON{where}: {reason}",
        "one whole JSON object",
        'mend the JSON there; quotes inside a text are written \\", line ends \\n',
        kind="broken_json",
        place=place or f"line {line}",
    )


def _bare_carriage_returns(line: int) -> LineProblem:
    return LineProblem(
        line,
        "lines that end in a bare carriage return",
        "lines that end in a line feed",
        "write the file with line feeds (for instance: tr '\\r' '\\n' < FILE > NEW)",
        kind="carriage_returns",
        place=f"line {line}",
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return (error.msg[:1].lower() + error.msg[1:]).removesuffix(" at")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a whole number has too many digits" if "integer string" in str(error) else str(error)


def _encodes(values: Any) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind_name(value: Any) -> str:
    names = {list: "array", str: "text", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


class _Window:
    """A sliding window of decoded text over a stream, which knows the line it stands on."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0
        self.line = 1
        self.at_end = False

    def fill(self, num_bytes: int = CHUNK_BYTES) -> None:
        """Read more text behind what is still unread."""
        chunk = self._stream.read(num_bytes)
        self.at_end = not chunk
        self.text = self.text[self.position :] + self._decoder.decode(chunk, final=self.at_end)
        self.position = 0

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """Pass over white space; the character that follows, or an empty string at the end."""
        while True:
            position = self.position
            while position < len(self.text) and self.text[position] in _SPACE:
                position += 1
            self.advance(position)
            if position < len(self.text):
                return self.text[position]
            if self.at_end:
                return ""
            self.fill()

    def column_of(self, position: int) -> tuple[int, int]:
        """Line and column (from 1) of a place in the text."""
        line = self.line + self.text.count("\n", self.position, position)
        return line, position - self.text.rfind("\n", 0, position)


def _read_array(stream: BinaryIO) -> Iterator[Row | LineProblem]:
    window = _Window(stream)
    try:
        yield from _items(window)
    except UnicodeDecodeError as error:
        line = window.line + window.text.count("\n", window.position) + error.object.count(b"\n", 0, error.start)
        yield invalid_utf8(line, error)


def _items(window: _Window) -> Iterator[Row | LineProblem]:
    window.next_character()
    window.advance(window.position + 1)  # the opening bracket
    item = 0
    while (character := window.next_character()) != "]":
        if item and character == ",":
            window.advance(window.position + 1)
            character = window.next_character()
        elif item:
            character = ""
        if not character:
            yield _stopped(window, "',' or ']'", item)
            return
        item += 1
        line, place = window.line, f"line {window.line}, item {item}"
        try:
            values, end = _decode_item(window)
        except _BrokenItemError as broken:
            # Where a broken item ends cannot be known, so the rest of the file is not read.
            yield broken.problem(place)
            return
        hides = "\\ud" in (text := window.text[window.position : end]) or "\\uD" in text
        window.advance(end)
        yield _row(line, values, place, hides)
    window.advance(window.position + 1)
    if window.next_character():
        yield _stopped(window, "the end of the file behind the array", item)


class _BrokenItemError(Exception):
    def __init__(self, line: int, column: int | None, reason: str, kind: str = "broken_json") -> None:
        super().__init__(reason)
        self.line, self.column, self.reason, self.kind = line, column, reason, kind

    def problem(self, place: str) -> LineProblem:
        if self.kind == "line_too_long":
            return LineProblem(
                self.line,
                f"the item is longer than {MAX_ROW_BYTES / 1e6:.0f} MB; what follows was not read",
                f"items under {MAX_ROW_BYTES / 1e6:.0f} MB",
                "split it into several rows, or look for a missing quote or bracket",
                kind=self.kind,
                place=place,
            )
        reason = f"{self.reason}; what follows was not read"
        return broken_json(self.line, self.column, reason, f"line {self.line}, in the item of {place}")


def _decode_item(window: _Window) -> tuple[Any, int]:
    """The value at the window's position and where it ends, reading on as long as it is incomplete."""
    grow_bytes = CHUNK_BYTES
    while True:
        try:
            values, end = _DECODER.raw_decode(window.text, window.position)
            if end - window.position >= MAX_ROW_BYTES:
                raise _BrokenItemError(window.line, None, "", kind="line_too_long")
            # A number that touches the window's end may go on behind it.
            if end < len(window.text) or window.at_end or window.text[end - 1] in '}]"':
                return values, end
        except json.JSONDecodeError as error:
            if window.at_end:
                raise _BrokenItemError(*window.column_of(error.pos), _reason(error)) from None
        except (ValueError, RecursionError) as error:
            raise _BrokenItemError(window.line, None, _reason(error)) from None
        num_unread = len(window.text) - window.position
        if num_unread >= MAX_ROW_BYTES:
            raise _too_long_or_broken(window)
        window.fill(min(grow_bytes, MAX_ROW_BYTES - num_unread))
        grow_bytes *= 2


def _too_long_or_broken(window: _Window) -> _BrokenItemError:
    """Tell an item that really is this long from one whose error stands early in it."""
    try:
        _DECODER.raw_decode(window.text, window.position)
    except json.JSONDecodeError as error:
        if error.pos < len(window.text) - 16 and not error.msg.startswith("Unterminated string"):
            return _BrokenItemError(*window.column_of(error.pos), _reason(error))
    return _BrokenItemError(window.line, None, "", kind="line_too_long")


def _stopped(window: _Window, expected: str, item: int) -> LineProblem:
    rest = window.text[window.position : window.position + 20]
    found = repr(rest) if rest else "the end of the file"
    line, column = window.column_of(window.position)
    return LineProblem(
        line,
        f"broken JSON at column {column} behind item {item}: {found}; what follows was not read",
        expected,
        "mend the array there",
        kind="broken_json",
        place=f"line {line}",
    )
