"""Stores: what is written comes back, and a failed write leaves nothing half done."""

from __future__ import annotations

import errno
import io
import os
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import store
from luthier.data.store import ExampleStore, ExampleWriter, RecordStore, RecordWriter
from luthier.errors import StorageError
from luthier.types import NO_CLASS, Example


def make_examples(num_examples: int, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 50, num_examples)
    return [
        Example(
            tokens=random.integers(0, 300, length).astype(np.int32),
            weights=random.random(length).astype(np.float32),
            class_index=NO_CLASS if index % 2 else index,
            row=index // 3,
        )
        for index, length in enumerate(lengths)
    ]


def write_examples(folder: Path, examples: Iterable[Example]) -> ExampleStore:
    with ExampleWriter(folder) as writer:
        for example in examples:
            writer.write(example)
    return ExampleStore(folder)


def write_records(folder: Path, records: list[Any]) -> RecordStore:
    with RecordWriter(folder) as writer:
        for number, record in enumerate(records):
            writer.write(record, number * 2)
    return RecordStore(folder)


class FullDisk(io.FileIO):
    """A file on a disk that is full after some bytes."""

    room = 10_000

    def write(self, content: Any) -> int:
        FullDisk.room -= len(content)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    FullDisk.room = num_bytes
    # A small buffer, so that the failure comes while writing and not only when the file is closed.
    monkeypatch.setattr(store, "open", lambda path, mode: io.BufferedWriter(FullDisk(path, "w"), 256), raising=False)


def test_examples_come_back(tmp_path: Path) -> None:
    examples = make_examples(50)
    found = write_examples(tmp_path / "train", examples)
    assert len(found) == 50
    for index in (*range(50), -1, -50):
        assert np.array_equal(found[index].tokens, examples[index].tokens)
        assert np.array_equal(found[index].weights, examples[index].weights)
        assert found[index].tokens.dtype == np.int32
        assert found[index].weights.dtype == np.float32
        assert (found[index].class_index, found[index].row) == (examples[index].class_index, examples[index].row)
    assert found.num_tokens.tolist() == [example.num_tokens for example in examples]
    assert found.total_tokens == sum(example.num_tokens for example in examples)
    sums = [example.weights.sum(dtype=np.float64) for example in examples]
    assert found.weight_sums.dtype == np.float64
    assert found.weight_sums.tolist() == sums
    assert [example.num_tokens for example in found] == found.num_tokens.tolist()
    with pytest.raises(IndexError):
        found[50]


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    found = write_examples(tmp_path / "none", [])
    assert (len(found), found.total_tokens, list(found), found.weight_sums.shape) == (0, 0, [], (0,))


def test_changing_an_example_leaves_the_store_as_it_is(tmp_path: Path) -> None:
    found = write_examples(tmp_path / "train", make_examples(3))
    kept = found[1].tokens.copy()
    found[1].tokens[:] = 0
    assert np.array_equal(found[1].tokens, kept)


def test_records_come_back(tmp_path: Path) -> None:
    records = [{"text": "Über\n東京 😀", "n": number, "list": [1, None, True]} for number in range(20)]
    found = write_records(tmp_path / "records", records)
    assert len(found) == 20
    assert list(found) == records
    assert found[-1] == records[-1]
    assert found.rows.tolist() == [number * 2 for number in range(20)]


@pytest.mark.parametrize("room", [0, 300, 3_000, 11_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    kept = write_examples(tmp_path / "kept", make_examples(5))
    fill_disk_after(monkeypatch, room)
    with pytest.raises(StorageError) as caught:
        write_examples(tmp_path / "train", make_examples(100))
    assert "the disk is full" in caught.value.message
    assert "what was there before is untouched" in caught.value.message
    assert os.listdir(tmp_path) == ["kept"]
    monkeypatch.undo()
    assert len(ExampleStore(kept.folder)) == 5
    assert len(write_examples(tmp_path / "train", make_examples(100))) == 100


def test_a_full_disk_while_writing_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk_after(monkeypatch, 1000)
    with pytest.raises(StorageError, match="the disk is full"):
        write_records(tmp_path / "records", [{"text": "x" * 100}] * 100)
    assert os.listdir(tmp_path) == []


def test_an_error_in_between_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_examples(tmp_path / "train", (example if example.row < 3 else 1 / 0 for example in make_examples(20)))
    assert os.listdir(tmp_path) == []


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    found = write_examples(tmp_path / "train", make_examples(5))
    (found.folder / "weights.bin").write_bytes(b"short")
    with pytest.raises(StorageError, match="cut short"):
        ExampleStore(found.folder)
    with pytest.raises(StorageError, match="not a whole store"):
        ExampleStore(tmp_path)


def test_a_large_store_is_not_read_into_memory(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    example = Example(np.arange(20_000, dtype=np.int32), np.ones(20_000, dtype=np.float32))
    found = write_examples(folder, [example] * 200)
    assert (folder / "tokens.bin").stat().st_size == 16_000_000
    tracemalloc.start()
    same = all(np.array_equal(other.tokens, example.tokens) for other in found)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same
    assert peak_bytes < 1e6


def test_a_store_that_stands_already_stays(tmp_path: Path) -> None:
    first = write_examples(tmp_path / "train", make_examples(5))
    write_examples(tmp_path / "train", make_examples(7))
    assert len(ExampleStore(first.folder)) == 5
    assert os.listdir(tmp_path) == ["train"]
