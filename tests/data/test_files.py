"""Bytes -> rows: every kind of file, every way in which one can be broken."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from luthier.data.files import MAX_PIECE_CHARACTERS, PIECE_CHARACTERS, content_hash, open_rows
from luthier.data.lines import LineProblem, Row
from luthier.errors import DataError

ROWS = [
    {"prompt": "How are you?", "completion": "Fine, thanks"},
    {"prompt": 'She said "no",\nand left', "completion": "Über 東京 😀"},
    {"prompt": "tab\there", "completion": "end"},
]


def write_json_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> None:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    "jsonl": write_json_lines,
    "json": lambda path, rows: (
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8") and None
    ),
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
}


def rows_of(path: Path) -> list[Row | LineProblem]:
    return list(open_rows(path))


def values_of(path: Path) -> list[dict[str, str]]:
    rows = rows_of(path)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def problems_of(path: Path) -> list[LineProblem]:
    return [row for row in open_rows(path) if isinstance(row, LineProblem)]


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"train.{kind}"
    WRITERS[kind](path, ROWS)
    assert values_of(path) == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_compressed_files_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    plain = tmp_path / f"train.{kind}"
    WRITERS[kind](plain, ROWS)
    packed = tmp_path / f"train.{kind}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert values_of(packed) == ROWS


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    lines = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [row.line for row in rows_of(lines)] == [1, 4]
    table = write(tmp_path, "a.csv", b'\xef\xbb\xbftext,label\n"two\nlines",x\n\nthird,y\n')
    assert [(row.line, row.values) for row in rows_of(table) if isinstance(row, Row)] == [
        (2, {"text": "two\nlines", "label": "x"}),
        (5, {"text": "third", "label": "y"}),
    ]
    array = write(tmp_path, "a.json", b'[\n {"a": 1},\n\n {"a":\n 2}]')
    assert [(row.line, row.place) for row in rows_of(array)] == [(2, "line 2, item 1"), (4, "line 4, item 2")]


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n' * 6 + b'{"a": \n{"a": 1}\n', "broken_json", "column 7"),
        ("a.jsonl", b'{"a": 1}\n' * 6 + b'{"a": NaN}\n', "broken_json", "NaN is not JSON"),
        ("a.jsonl", b'{"a": 1}\n' * 6 + b"[" * 100_000 + b"\n", "broken_json", "nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n' * 6 + b"[1, 2]\n", "not_an_object", "array"),
        ("a.jsonl", b'{"a": 1}\n' * 6 + b'{"a": "caf\xe9"}\n', "invalid_utf8", "byte 0xe9 at position 11"),
        ("a.jsonl", b'{"a": 1}\n' * 6 + b'{"a": "\\ud83d"}\n', "half_character", "half of a character"),
        ("a.csv", b"a,b\n" + b"1,2\n" * 5 + b"1,2,3\n1,2\n", "wrong_column_count", "3 columns"),
        ("a.csv", b"a,b\n" + b"1,2\n" * 5 + b'1,"2\n', "unclosed_quote", "not closed"),
        ("a.csv", b"a,b\n" + b"1,2\n" * 5 + b'"x"y,2\n1,2\n', "malformed_record", "malformed"),
        ("a.csv", b"a,b\n" + b"1,2\n" * 5 + b"caf\xe9,2\n1,2\n", "invalid_utf8", "byte 0xe9 at position 4"),
        ("a.json", b"[\n" + b'{"a": 1},\n' * 5 + b'{"a": 1,}\n]', "broken_json", "not read"),
        ("a.json", b"[\n" + b'{"a": 1},\n' * 5 + b'{"a": 1', "broken_json", "not read"),
        ("a.json", b"[\n" + b'{"a": 1},\n' * 5 + b"17]", "not_an_object", "number"),
        ("a.json", b"[\n" + b'{"a": 1},\n' * 4 + b'{"a": 1}\n{"a": 1}]', "broken_json", "expected ',' or ']'"),
        ("a.json", b"[\n" + b'{"a": 1},\n' * 5 + b'{"a": "caf\xe9"}]', "invalid_utf8", "byte 0xe9"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, name: str, content: bytes, kind: str, words: str) -> None:
    path = write(tmp_path, name, content)
    (problem,) = problems_of(path)
    assert (problem.line, problem.kind, problem.file) == (7, kind, str(path))
    assert words in problem.message
    assert "line 7" in problem.message
    assert problem.expected


def test_rows_behind_a_broken_one_are_still_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n{"a"\n\xff\n{"a": 2}\n')
    assert [type(row) for row in rows_of(path)] == [Row, LineProblem, LineProblem, Row]
    table = write(tmp_path, "a.csv", b'a,b\n1,2,3\n"x"y,2\ncaf\xe9,2\n1,2\n')
    assert [row.line for row in rows_of(table)] == [2, 3, 4, 5]


def test_a_line_of_ten_megabytes_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    huge = json.dumps({"prompt": "x" * 30_000_000, "completion": "y"}).encode()
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n' + huge + b'\n{"a": 2}\n')
    tracemalloc.start()
    rows = rows_of(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [type(row) for row in rows] == [Row, LineProblem, Row]
    problem = rows[1]
    assert isinstance(problem, LineProblem)
    assert problem.line == 2
    assert "30.0 MB" in problem.found
    assert [row.line for row in rows] == [1, 2, 3]
    assert peak_bytes < 25e6


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'[{"a": "' + b"x" * 12_000_000 + b'"}]'),
        ("a.csv", b'a,b\n1,"' + b"x,y and more of it\n" * 600_000 + b'"\n'),
    ],
)
def test_other_rows_of_ten_megabytes_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (problem,) = problems_of(write(tmp_path, name, content))
    assert problem.kind in ("line_too_long", "unclosed_quote")
    assert problem.line == (1 if name == "a.json" else 2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("empty.csv", b"", "is empty"),
        ("a.xlsx", b"x", "ending '.xlsx'"),
        ("a.jsnol", b"x", "did you mean '.json"),
        ("wide.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("packed.jsonl", gzip.compress(b'{"a": 1}', mtime=0), "compressed with gzip"),
        ("cut.jsonl.gz", gzip.compress(json.dumps(list(range(9999))).encode())[:-200], "not a whole gzip file"),
        ("sheet.csv", b"PK\x03\x04xxxx", "spreadsheet"),
        ("object.json", b'{\n "data": [1]\n}', "one JSON object"),
        ("scalar.json", b"17", "no JSON array"),
        ("blank.csv", b"\n\n", "is empty"),
        ("twice.csv", b"a,a\n1,2\n", "names a column twice: a"),
        ("unnamed.csv", b"a,,c\n1,2,3\n", "column without a name"),
        ("semicolons.csv", b"a;b\n1;2\n", "which holds ';'"),
        ("a.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_is_no_data_file_says_what_it_is(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert words in caught.value.message
    assert name in caught.value.message


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", b"{}")
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        open_rows(tmp_path / "trian.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        open_rows(tmp_path / "folder.jsonl")


def test_a_json_file_with_an_object_a_line_is_read_by_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", b'\n{"a": 1}\n{"a": 2}\n')
    assert [(row.line, row.values) for row in rows_of(path) if isinstance(row, Row)] == [(2, {"a": 1}), (3, {"a": 2})]


def test_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * 200 for number in range(200)]
    path = write(tmp_path, "book.txt", "\n\n".join(paragraphs).encode())
    pieces = [row["text"] for row in values_of(path)]
    assert len(pieces) > 5
    assert all(piece.startswith("Paragraph") for piece in pieces)
    assert all(PIECE_CHARACTERS <= len(piece) < 2 * PIECE_CHARACTERS for piece in pieces[:-1])
    assert "\n\n".join(pieces).split() == "\n\n".join(paragraphs).split()
    lines = write(tmp_path, "lines.txt", b"a line without a blank one\n" * 10_000)
    pieces = [row["text"] for row in values_of(lines)]
    assert all(len(piece) < MAX_PIECE_CHARACTERS + 100 for piece in pieces)
    assert "\n".join(pieces) + "\n" == lines.read_text()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_memory_stays_flat_on_a_large_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"large.{kind}"
    row = {"prompt": "some words " * 200, "completion": "more words " * 200}
    num_rows = 8_000
    if kind == "txt":
        path.write_text(("some words " * 400 + "\n\n") * num_rows)
    elif kind == "parquet":
        with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([(name, pyarrow.string()) for name in row])) as writer:
            for start in range(0, num_rows, 200):
                block = [{**row, "prompt": f"{start + index} {row['prompt']}"} for index in range(200)]
                writer.write_table(pyarrow.Table.from_pylist(block))
    else:
        WRITERS[kind](path, [row] * num_rows)
    if kind != "parquet":
        assert path.stat().st_size > 30e6
    tracemalloc.start()
    count = sum(1 for _ in open_rows(path))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == num_rows or kind == "txt"
    assert peak_bytes < 6e6


def test_content_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path, "a.jsonl", b"{}\n"), write(tmp_path, "b.jsonl", b"{}\n")
    assert content_hash(first) == content_hash(second)
    assert content_hash(first) == "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    second.write_bytes(b"{} \n")
    assert content_hash(first) != content_hash(second)
