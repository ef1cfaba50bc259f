"""CSV, TSV and Parquet -> rows, one at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from luthier.data.lines import MAX_ROW_BYTES, LineProblem, Row, decode, physical_lines
from luthier.errors import DataError

PARQUET_BATCH_ROWS = 256


class _UnreadableLineError(Exception):
    def __init__(self, problem: LineProblem, ends_reading: bool = False) -> None:
        super().__init__(problem.found)
        self.problem, self.ends_reading = problem, ends_reading


class _Lines:
    """Feeds decoded lines to the csv reader and stops a record that never ends (a quote that is not closed)."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = physical_lines(stream)
        self.record_start = 1
        self.last = 0
        self._record_bytes = 0

    def begin_record(self) -> None:
        self.record_start = self.last + 1
        self._record_bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = next(self._lines)
        self.last = raw.number
        text = decode(raw)
        if isinstance(text, LineProblem):
            raise _UnreadableLineError(text)
        self._record_bytes += raw.num_bytes
        if self._record_bytes >= MAX_ROW_BYTES:
            raise _UnreadableLineError(_unclosed_quote(self.record_start), ends_reading=True)
        return text + "\n"


def read_table(stream: BinaryIO, name: str, delimiter: str) -> Iterator[Row | LineProblem]:
    """Rows of a CSV or TSV file whose first line names the columns; quoted values may hold line ends.

    Raises:
        DataError: for a header that is missing, names a column twice or not at all, or seems to use another delimiter.
    """
    # The csv module's limit is one for the process; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns = _header(reader, lines, name, delimiter)
    while True:
        lines.begin_record()
        try:
            values = next(reader)
        except StopIteration:
            return
        except _UnreadableLineError as unreadable:
            yield unreadable.problem
            if unreadable.ends_reading:
                return
            continue
        except csv.Error as error:
            yield _malformed(lines.record_start, error)
            continue
        if not values:
            continue
        yield _table_row(lines.record_start, values, columns)


def _header(reader: Any, lines: _Lines, name: str, delimiter: str) -> list[str]:
    expected = "a first line that names the columns, as in text,label"
    columns: list[str] = []
    try:
        while not columns:
            columns = [column.strip() for column in next(reader)]
    except StopIteration:
        raise DataError(f"{name} is empty", expected, "add the header and the rows") from None
    except (_UnreadableLineError, csv.Error) as error:
        problem = error.problem if isinstance(error, _UnreadableLineError) else _malformed(lines.record_start, error)
        raise DataError(f"{name}, line {problem.line}: {problem.found}", problem.expected, problem.fix) from None
    if "" in columns:
        raise DataError(f"{name} has a column without a name (column {columns.index('') + 1})", expected, "name it")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"{name} names a column twice: {', '.join(twice)}", expected, "rename one of them")
    others = [other for other in ",;\t|" if other != delimiter and other in columns[0]]
    if len(columns) == 1 and others:
        raise DataError(
            f"{name} has one column, {columns[0]!r}, which holds {others[0]!r}",
            f"columns parted by {'a tab' if delimiter == chr(9) else 'a comma'}",
            "save the file with that delimiter, or name a tab-separated file .tsv",
        )
    return columns


def _table_row(line: int, values: list[str], columns: list[str]) -> Row | LineProblem:
    if len(values) != len(columns):
        return LineProblem(
            line,
            f"{len(values)} columns",
            f"{len(columns)} columns ({', '.join(columns)})",
            'put values that hold a delimiter or a line end into quotes, "like, this"',
            kind="wrong_column_count",
            place=f"line {line}",
        )
    return Row(line, dict(zip(columns, values, strict=True)), f"line {line}")


def _malformed(line: int, error: Exception) -> LineProblem:
    if "unexpected end of data" in str(error):
        return _unclosed_quote(line)
    return LineProblem(
        line,
        f"a malformed record: {error}",
        'values in quotes, with quotes inside them doubled, "like ""this"""',
        "mend the quotes of this record",
        kind="malformed_record",
        place=f"line {line}",
    )


def _unclosed_quote(line: int) -> LineProblem:
    return LineProblem(
        line,
        "a quote opens in this record and is not closed; what follows was not read",
        "a closing quote",
        "close it, or double it if it belongs to the text",
        kind="unclosed_quote",
        place=f"line {line}",
    )


def read_parquet(path: Path, name: str) -> Iterator[Row | LineProblem]:
    """Rows of a Parquet file, a small batch at a time; `line` is the row's number from 1.

    Raises:
        DataError: when the file is not Parquet, or broken.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values, f"row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} cannot be read as Parquet: {error}", "a whole Parquet file", "write it again"
        ) from None
