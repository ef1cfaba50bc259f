"""Bytes -> rows: opens a data file of any known kind and streams its rows, holding one at a time.

| ending | rows |
|---|---|
| .jsonl, .ndjson | one JSON object a line |
| .json | the objects of one array (streamed), or one object a line |
| .csv, .tsv | a header, then one record a row; values may be quoted and hold line ends |
| .parquet | the table's rows |
| .txt | pieces of about 16,000 characters, cut at a blank line, each with the one column `text` |

All but Parquet may be compressed, as in train.jsonl.gz. A .txt file is cut into pieces so that some of it can be held
out and memory stays flat; the `text` task cuts pieces further into windows of `max_length` tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from luthier.data.json_files import read_json, read_json_lines
from luthier.data.lines import LineProblem, Row, decode, physical_lines
from luthier.data.table_files import read_parquet, read_table
from luthier.errors import DataError, nearest

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
PIECE_CHARACTERS = 16_384
"""A piece of a .txt file ends at the first blank line behind this many characters,"""
MAX_PIECE_CHARACTERS = 65_536
"""or at the first line end behind this many."""


def file_kind(path: str | Path) -> tuple[str, bool]:
    """The kind of a data file by its ending ("jsonl", "csv", ...), and whether it is compressed with gzip.

    Raises:
        DataError: for an ending that is not known.
    """
    name = Path(path).name.lower()
    compressed = name.endswith(".gz")
    ending = Path(name.removesuffix(".gz")).suffix
    kind = KINDS.get(ending)
    if kind is None or (compressed and kind == "parquet"):
        raise DataError(
            f"{path} has the ending {ending or 'of no known kind'!r}{nearest(ending, KINDS)}",
            f"one of {', '.join(KINDS)}; .gz behind any but .parquet",
            "convert it to JSON Lines (.jsonl), one object a line",
        )
    return kind, compressed


def open_rows(path: str | Path) -> Iterator[Row | LineProblem]:
    """Stream a data file's rows; a row that cannot be read comes as a `LineProblem` in its place.

    Memory stays flat however large the file is.

    Raises:
        DataError: at once for a missing or empty file, a folder, an unknown ending or an encoding other than UTF-8;
            while streaming for a compressed or Parquet file that is broken.
    """
    path = Path(path)
    kind, compressed = file_kind(path)
    _check_exists(path)
    if kind == "parquet":
        return _named(read_parquet(path, str(path)), str(path))
    _check_encoding(path, compressed)
    return _named(_read(path, kind, compressed), str(path))


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal.

    Raises:
        DataError: when the file is missing, empty or a folder.
    """
    _check_exists(Path(path))
    with _reading(Path(path)), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_exists(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder", "a data file", f"name a file in it, as in {path / 'train.jsonl'}")
    try:
        num_bytes = path.stat().st_size
    except FileNotFoundError:
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"there is no data file at {path}{nearest(path.name, siblings)}",
            fix="name an existing file; relative paths start at the current folder, then at the recipe's own",
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "a readable file") from None
    if num_bytes == 0:
        raise DataError(f"{path} is empty", "at least one row", "write the rows into it, one a line")


def _check_encoding(path: Path, compressed: bool) -> None:
    with _reading(path), _open(path, compressed) as stream:
        head = stream.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is text in UTF-16", "UTF-8", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE)")
    if head.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is compressed with gzip", "an ending that says so", f"name it {path.name}.gz")
    if head.startswith((b"PK\x03\x04", b"PAR1")):
        what = "a Parquet file" if head == b"PAR1" else "a zip archive or a spreadsheet"
        raise DataError(
            f"{path} is {what}", "text", "name it .parquet" if head == b"PAR1" else "save it as CSV or JSONL"
        )


def _open(path: Path, compressed: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if compressed else open(path, "rb")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong below the rows (a broken archive, a failing disk) into a DataError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is not a whole gzip file: {error}", "a file as gzip wrote it", "compress it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "a readable file") from None


def _read(path: Path, kind: str, compressed: bool) -> Iterator[Row | LineProblem]:
    with _reading(path), _open(path, compressed) as stream:
        if kind == "jsonl":
            yield from read_json_lines(stream)
        elif kind == "json":
            yield from read_json(stream, str(path))
        elif kind == "txt":
            yield from _read_text(stream)
        else:
            yield from read_table(stream, str(path), "," if kind == "csv" else "\t")


def _named(rows: Iterator[Row | LineProblem], name: str) -> Iterator[Row | LineProblem]:
    for row in rows:
        yield row if isinstance(row, Row) else replace(row, file=name, place=row.place or f"line {row.line}")


def _read_text(stream: BinaryIO) -> Iterator[Row | LineProblem]:
    piece: list[str] = []
    start = 1
    num_characters = 0
    for raw in physical_lines(stream):
        text = decode(raw)
        if isinstance(text, LineProblem):
            yield text
            continue
        ends = (num_characters > PIECE_CHARACTERS and not text.strip()) or num_characters > MAX_PIECE_CHARACTERS
        if ends or not piece:
            yield from _piece(start, piece)
            piece, start, num_characters = [], raw.number, 0
        if piece or text.strip():
            piece.append(text)
            num_characters += len(text) + 1
    yield from _piece(start, piece)


def _piece(line: int, piece: list[str]) -> Iterator[Row]:
    if piece:
        yield Row(line, {"text": "\n".join(piece).rstrip()}, f"line {line}")
