"""Physical lines of a byte stream, bounded in memory, and what is found wrong in one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_ROW_BYTES = 10_000_000
"""A line, item or record of this many bytes is refused: nearly always a broken file rather than one training row."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file holds it.

    Attributes:
        line: The physical line (from 1) on which the row begins; in Parquet, which has no lines, the row's number.
        values: Column name -> value.
        place: How a person finds the row, as in "line 7".
    """

    line: int
    values: dict[str, Any]
    place: str = ""


@dataclass(frozen=True, slots=True)
class LineProblem:
    """What is wrong with one row, where, and how to mend it.

    Attributes:
        line: As in `Row`.
        found: What was met.
        expected: What should have been there.
        fix: What to do.
        kind: A short fixed name by which problems are counted, as in "broken_json".
        field: The column or field concerned, or empty.
        file: The file's path as the user gave it.
        place: How a person finds the row, as in "line 7".
    """

    line: int
    found: str
    expected: str = ""
    fix: str = ""
    kind: str = "unreadable"
    field: str = ""
    file: str = ""
    place: str = ""

    @property
    def message(self) -> str:
        """The problem in one line of text."""
        where = f"{self.file}, {self.place or f'line {self.line}'}" if self.file else self.place or f"line {self.line}"
        field = f" (field {self.field})" if self.field else ""
        expected = f"; expected {self.expected}" if self.expected else ""
        fix = f"; to fix: {self.fix}" if self.fix else ""
        return f"{where}{field}: {self.found}{expected}{fix}"


@dataclass(frozen=True, slots=True)
class RawLine:
    """A physical line before decoding; `content` is None where the line was too long to be read."""

    number: int
    content: bytes | None
    num_bytes: int


def physical_lines(stream: BinaryIO, max_bytes: int = MAX_ROW_BYTES) -> Iterator[RawLine]:
    """The lines of `stream` without their ends, a leading byte-order mark left out.

    A line of `max_bytes` or more is passed over in small pieces and comes out with its size alone.
    """
    number = 0
    while content := stream.readline(max_bytes):
        number += 1
        if len(content) >= max_bytes:
            yield RawLine(number, None, len(content) + _pass_over_line(stream, content))
            continue
        if number == 1 and content.startswith(BYTE_ORDER_MARK):
            content = content[len(BYTE_ORDER_MARK) :]
        yield RawLine(number, content.rstrip(b"\r\n"), len(content))


def _pass_over_line(stream: BinaryIO, content: bytes) -> int:
    """Read up to the line's end; the number of bytes passed over."""
    num_bytes = 0
    while content and not content.endswith(b"\n"):
        content = stream.readline(1 << 16)
        num_bytes += len(content)
    return num_bytes


def decode(line: RawLine) -> str | LineProblem:
    """The line as text, or what keeps it from being text: its size, or bytes that are not UTF-8."""
    if line.content is None:
        return LineProblem(
            line.number,
            f"the line is {line.num_bytes / 1e6:.1f} MB long",
            f"lines under {MAX_ROW_BYTES / 1e6:.0f} MB",
            "split it into several rows, or check whether line ends got lost",
            kind="line_too_long",
        )
    try:
        return line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        return invalid_utf8(line.number, error)


def invalid_utf8(line: int, error: UnicodeDecodeError) -> LineProblem:
    """The problem of bytes that are not UTF-8, naming the byte and where in the line it stands."""
    start = error.object.rfind(b"\n", 0, error.start) + 1
    return LineProblem(
        line,
        f"byte 0x{error.object[error.start]:02x} at position {error.start - start + 1} of the line is not valid UTF-8",
        "text in UTF-8",
        "save the file as UTF-8 (for instance: iconv -f LATIN1 -t UTF-8 FILE)",
        kind="invalid_utf8",
    )
