"""Files -> stores: split, cached by content, whole or not there at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import store
from luthier.data.prepare import NUM_TRAIN_RECORDS, PreparedData, prepare
from luthier.data.template import Renderer
from luthier.errors import DataError, StorageError
from luthier.recipe import DataConfig
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.completion.schema import CompletionConfig
from luthier.tasks.registry import task_for


def write_pairs(path: Path, num_rows: int, start: int = 0) -> str:
    rows = [{"prompt": f"Question {n}?", "completion": f" Answer {n}"} for n in range(start, start + num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare_in(folder: Path, renderer: Renderer, config: Any = None, **options: Any) -> PreparedData:
    data = DataConfig(train=options.pop("train"), validation=options.pop("validation", 0.2))
    task = task_for(config or CompletionConfig())
    return prepare(data, task, renderer, folder=folder / "cache", **{"max_length": 128, **options})


def prompts_of(prepared: PreparedData) -> tuple[set[str], set[str]]:
    assert prepared.validation_records is not None
    held_out = {record["prompt"] for record in prepared.validation_records}
    return {record["prompt"] for record in prepared.train_records}, held_out


def test_a_file_becomes_stores(tmp_path: Path, chatml: Renderer) -> None:
    train = write_pairs(tmp_path / "train.jsonl", 100)
    prepared = prepare_in(tmp_path, chatml, train=train)
    assert prepared.validation is not None
    assert prepared.validation_records is not None
    assert (len(prepared.train), len(prepared.validation), len(prepared.validation_records)) == (80, 20, 20)
    assert len(prepared.train_records) == NUM_TRAIN_RECORDS
    shown, held_out = prompts_of(prepared)
    assert not shown & held_out
    assert prepared.report.train.num_tokens == prepared.train.total_tokens
    record = prepared.task.from_json(prepared.validation_records[3])
    row = int(prepared.validation_records.rows[3])
    (expected,) = prepared.task.examples(record, chatml, 128, "end", row)
    example = next(example for example in prepared.validation if example.row == row)
    assert np.array_equal(example.tokens, expected.tokens)
    assert np.array_equal(example.weights, expected.weights)


def test_a_prepared_dataset_is_found_again(tmp_path: Path, chatml: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write_pairs(tmp_path / "train.jsonl", 30)
    first = prepare_in(tmp_path, chatml, train=train)
    monkeypatch.setattr("luthier.data.prepare.DataCheck", None)  # a second check would fail
    again = prepare_in(tmp_path, chatml, train=train)
    assert (again.folder, again.data_hash) == (first.folder, first.data_hash)
    assert again.report.to_json() == first.report.to_json()
    moved = prepare_in(tmp_path, chatml, train=write_pairs(tmp_path / "moved.jsonl", 30))
    assert moved.folder == first.folder


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 64},
        {"truncation": "error"},
        {"seed": 7},
        {"validation": 0.1},
        {"validation": None},
        {"config": CompletionConfig(train_on_prompt=True)},
    ],
)
def test_whatever_decides_the_contents_decides_the_folder(
    tmp_path: Path, chatml: Renderer, change: dict[str, Any]
) -> None:
    train = write_pairs(tmp_path / "train.jsonl", 30)
    first = prepare_in(tmp_path, chatml, train=train)
    assert prepare_in(tmp_path, chatml, train=train, **change).folder != first.folder


def test_changed_rows_are_prepared_anew(tmp_path: Path, chatml: Renderer) -> None:
    first = prepare_in(tmp_path, chatml, train=write_pairs(tmp_path / "train.jsonl", 30))
    second = prepare_in(tmp_path, chatml, train=write_pairs(tmp_path / "train.jsonl", 31))
    assert first.data_hash != second.data_hash
    assert len(second.train) + len(second.validation or []) == 31


def test_several_files_and_a_validation_file(tmp_path: Path, chatml: Renderer) -> None:
    train = [write_pairs(tmp_path / "a.jsonl", 10), write_pairs(tmp_path / "b.jsonl", 10, start=10)]
    held_out = write_pairs(tmp_path / "held_out.jsonl", 5, start=100)
    prepared = prepare_in(tmp_path, chatml, train=train, validation=held_out)
    assert prepared.validation is not None
    assert (len(prepared.train), len(prepared.validation)) == (20, 5)
    assert [example.row for example in prepared.train] == list(range(20))
    assert [example.row for example in prepared.validation] == list(range(5))


def test_nothing_held_out(tmp_path: Path, chatml: Renderer) -> None:
    prepared = prepare_in(tmp_path, chatml, train=write_pairs(tmp_path / "train.jsonl", 10), validation=None)
    assert (len(prepared.train), prepared.validation, prepared.validation_records) == (10, None, None)


def test_classes_are_settled(tmp_path: Path, chatml: Renderer) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{'xyz'[n % 3]}\n" for n in range(30)))
    for _ in range(2):  # made, then found again
        prepared = prepare_in(tmp_path, chatml, ClassificationConfig(), train=str(path))
        assert prepared.task.labels == ("x", "y", "z")
        assert {example.class_index for example in prepared.train} == {0, 1, 2}
        assert all(example.class_index == example.row % 3 for example in prepared.train)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"prompt": "x"\n', "line 7: broken JSON"),
        (b'{"prompt": "x"}\n', "line 7 (field completion)"),
        (b'{"prompt": "caf\xe9", "completion": "y"}\n', "line 7: byte 0xe9"),
        (b'{"prompt": "' + b"x" * 10_000_000 + b'", "completion": "y"}\n', "line 7: the line is 10.0 MB long"),
        (json.dumps({"prompt": "word " * 500, "completion": "y"}).encode() + b"\n", "line 7: the row is"),
    ],
)
def test_a_bad_row_stops_the_run_and_leaves_nothing(tmp_path: Path, chatml: Renderer, bad: bytes, words: str) -> None:
    path = tmp_path / "train.jsonl"
    good = b'{"prompt": "x", "completion": "y"}\n'
    path.write_bytes(good * 6 + bad + good)
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        prepare_in(tmp_path, chatml, train=str(path))
    assert words in caught.value.message
    assert caught.value.exit_code == 2
    assert path.read_bytes() == before
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []


def test_a_full_disk_says_what_is_whole(tmp_path: Path, chatml: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write_pairs(tmp_path / "train.jsonl", 30)

    def append(self: Any, name: str, content: bytes) -> None:
        with store.writing(self.folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._StoreWriter, "_append", append)
    with pytest.raises(StorageError, match="the disk is full"):
        prepare_in(tmp_path, chatml, train=train)
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.undo()
    assert len(prepare_in(tmp_path, chatml, train=train).train) == 24


def test_a_damaged_dataset_is_made_anew(tmp_path: Path, chatml: Renderer) -> None:
    train = write_pairs(tmp_path / "train.jsonl", 30)
    first = prepare_in(tmp_path, chatml, train=train)
    expected = first.train[0].tokens
    (first.folder / "train" / "tokens.bin").write_bytes(b"")
    again = prepare_in(tmp_path, chatml, train=train)
    assert np.array_equal(again.train[0].tokens, expected)


def test_progress_is_told(tmp_path: Path, chatml: Renderer) -> None:
    told: list[tuple[str, int]] = []
    train = write_pairs(tmp_path / "train.jsonl", 600)
    prepare_in(tmp_path, chatml, train=train, on_progress=lambda stage, num_rows: told.append((stage, num_rows)))
    assert told == [(stage, n) for stage in ("reading", "tokenizing") for n in (256, 512, 600)]
