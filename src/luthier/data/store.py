"""Examples and records on disk, read through memory maps: memory stays flat however many there are.

A store is a folder. It is written under a temporary name and put in its place when it is whole, so a folder with a
store's name always holds a whole store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from luthier.errors import StorageError
from luthier.files import atomic_folder, writing
from luthier.types import Example, Pair

FORMAT = 3
_COLUMNS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "weights": np.dtype("<f4"),
    "ends": np.dtype("<i8"),
    "class_index": np.dtype("<i4"),
    "row": np.dtype("<i8"),
    "weight_sum": np.dtype("<f8"),
    "tags": np.dtype("<i4"),
    "pair": np.dtype([("rejected_at", "<i4"), ("beta", "<f8"), ("label_smoothing", "<f8")]),
    "class_flags": np.dtype("u1"),
}
"""`tags` holds a value for every token, or nothing at all: only a token head has tags. So does `pair` for examples.
Likewise `class_flags` holds a value for every class of every example, or nothing: only a multilabel head has them."""


class _StoreWriter:
    """A `with` block over a new store's open files; the folder appears whole when the block ends well."""

    file_names: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._streams: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        self._session = self._open_session()
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)

    @contextmanager
    def _open_session(self) -> Iterator[None]:
        with atomic_folder(self.folder) as temporary, ExitStack() as files:
            for name in self.file_names:
                self._streams[name] = files.enter_context(open(temporary / name, "wb"))
            yield
            files.close()
            (temporary / "index.json").write_text(json.dumps({"format": FORMAT, **self._index()}), encoding="utf-8")

    def _append(self, name: str, content: bytes) -> None:
        with writing(self.folder):
            self._streams[name].write(content)

    def _index(self) -> dict[str, int]:
        raise NotImplementedError


class ExampleWriter(_StoreWriter):
    """Streams examples into a new store; nothing appears under `folder` unless the block ends well.

    Raises:
        StorageError: when the disk is full or may not be written.
    """

    file_names = tuple(f"{name}.bin" for name in _COLUMNS)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.num_examples = 0
        self.num_tokens = 0
        self.num_tags = 0
        self.num_pairs = 0
        self.num_flags = 0

    def write(self, example: Example) -> None:
        """Append one example."""
        self.num_examples += 1
        self.num_tokens += example.num_tokens
        values: dict[str, Any] = {
            "tokens": example.tokens,
            "weights": example.weights,
            "ends": self.num_tokens,
            "class_index": example.class_index,
            "row": example.row,
            "weight_sum": example.weights.sum(dtype=np.float64),
        }
        if example.tags is not None:
            values["tags"] = example.tags
            self.num_tags += example.num_tokens
        if (pair := example.pair) is not None:
            values["pair"] = (pair.rejected_at, pair.beta, pair.label_smoothing)
            self.num_pairs += 1
        if example.class_flags is not None:
            values["class_flags"] = example.class_flags
            self.num_flags += len(example.class_flags)
        for name, value in values.items():
            self._append(f"{name}.bin", np.asarray(value, dtype=_COLUMNS[name]).tobytes())

    def _index(self) -> dict[str, int]:
        if self.num_tags not in (0, self.num_tokens):
            raise ValueError("examples with tags and without them do not share a store")
        if self.num_pairs not in (0, self.num_examples):
            raise ValueError("pairs and single sequences do not share a store")
        if self.num_flags and self.num_flags % self.num_examples:
            raise ValueError("examples of different numbers of classes do not share a store")
        return {
            "num_examples": self.num_examples,
            "num_tokens": self.num_tokens,
            "num_tags": self.num_tags,
            "num_pairs": self.num_pairs,
            "num_flags": self.num_flags,
        }


class RecordWriter(_StoreWriter):
    """Streams records, as canonical JSON lines, into a new `RecordStore`; errors as in `ExampleWriter`."""

    file_names = ("records.jsonl", "ends.bin")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.num_records = 0
        self._end = 0

    def write(self, record: Any, row: int) -> None:
        """Append one record in its JSON form, with the index of its row."""
        line = canonical_json(record).encode("utf-8") + b"\n"
        self._end += len(line)
        self._append("records.jsonl", line)
        self._append("ends.bin", np.asarray([self._end, row], dtype="<i8").tobytes())
        self.num_records += 1

    def _index(self) -> dict[str, int]:
        return {"num_records": self.num_records}


class ExampleStore:
    """Random access to the examples of a folder that `ExampleWriter` wrote, through memory maps.

    Raises:
        StorageError: when the folder is not a whole store of a known format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self._num_examples = int(index["num_examples"])
        self.total_tokens: int = int(index["num_tokens"])
        """Tokens of all examples together."""
        self._num_tags = int(index["num_tags"])
        self._num_pairs = int(index["num_pairs"])
        num_flags = int(index["num_flags"])
        self._num_classes = num_flags // self._num_examples if num_flags else 0
        expected = {
            "tokens": self.total_tokens,
            "weights": self.total_tokens,
            "tags": self._num_tags,
            "pair": self._num_pairs,
            "class_flags": num_flags,
        }
        for name, dtype in _COLUMNS.items():
            num_bytes = expected.get(name, self._num_examples) * dtype.itemsize
            path = folder / f"{name}.bin"
            if not path.exists() or path.stat().st_size != num_bytes:
                raise StorageError(
                    f"{path} is missing or cut short", f"{num_bytes} bytes", f"delete {folder}; it is made anew"
                )

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> Example:
        if not -self._num_examples <= index < self._num_examples:
            raise IndexError(f"example {index} of {self._num_examples}")
        index %= self._num_examples
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        return Example(
            tokens=np.array(self._tokens[start:end]),
            weights=np.array(self._weights[start:end]),
            class_index=int(self._class_index[index]),
            row=int(self.rows[index]),
            tags=np.array(self._tags[start:end]) if self._num_tags else None,
            pair=Pair(*self._pairs[index].item()) if self._num_pairs else None,
            class_flags=self._flags(index),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """int64 [num_examples]. Length of each example in tokens, of a pair with both sides."""
        return np.diff(self._ends, prepend=np.int64(0))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [num_sequences]. Length of each sequence in tokens: of each example, or of each side of a pair."""
        if not self._num_pairs:
            return self.num_tokens
        chosen = self._pairs["rejected_at"].astype(np.int64)
        return np.concatenate([chosen, self.num_tokens - chosen])

    @cached_property
    def weight_sums(self) -> NDArray[np.float64]:
        """float64 [num_examples]. Sum of each example's loss weights."""
        return self._map("weight_sum")

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        return self._map("tokens")

    @cached_property
    def _weights(self) -> NDArray[np.float32]:
        return self._map("weights")

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return self._map("ends")

    @cached_property
    def _class_index(self) -> NDArray[np.int32]:
        return self._map("class_index")

    @cached_property
    def _tags(self) -> NDArray[np.int32]:
        return self._map("tags")

    @cached_property
    def _pairs(self) -> NDArray[Any]:
        return self._map("pair")

    @cached_property
    def _class_flags(self) -> NDArray[np.uint8]:
        return self._map("class_flags")

    def _flags(self, index: int) -> NDArray[np.uint8] | None:
        size = self._num_classes
        return np.array(self._class_flags[index * size : (index + 1) * size]) if size else None

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """int64 [examples]. The record that each example came from."""
        return self._map("row")

    def _map(self, name: str) -> NDArray[Any]:
        path = self.folder / f"{name}.bin"
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=_COLUMNS[name])
        return np.memmap(path, dtype=_COLUMNS[name], mode="r")


class ReferencedStore(ExampleStore):
    """The pairs of a store with what their reference makes of them.

    Args:
        store: Of preference pairs.
        margins: float64 [num_examples]. log p(chosen) - log p(rejected) of each, as `Pair.reference`.
    """

    def __init__(self, store: ExampleStore, margins: NDArray[np.float64]) -> None:
        super().__init__(store.folder)
        if margins.shape != (len(self),):
            raise ValueError(f"{margins.shape} margins for {len(self)} pairs")
        self._margins = margins

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        assert example.pair is not None, "a reference is of pairs"
        return replace(example, pair=replace(example.pair, reference=float(self._margins[index])))


class RecordStore:
    """Random access to records in their JSON form, one read from disk at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._num_records = int(_read_index(folder)["num_records"])
        path = folder / "ends.bin"
        if not path.exists() or path.stat().st_size != 16 * self._num_records:
            raise StorageError(f"{path} is missing or cut short", fix=f"delete {folder}; it is made anew")

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> Any:
        """The record's JSON form; `task.from_json` makes a record of it."""
        if not -self._num_records <= index < self._num_records:
            raise IndexError(f"record {index} of {self._num_records}")
        index %= self._num_records
        start, end = int(self._ends[index - 1, 0]) if index else 0, int(self._ends[index, 0])
        with open(self.folder / "records.jsonl", "rb") as stream:
            stream.seek(start)
            return json.loads(stream.read(end - start))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 [num_records]. Index of each record's row, as in `Example.row`."""
        return self._ends[:, 1]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        path = self.folder / "ends.bin"
        if path.stat().st_size == 0:
            return np.empty((0, 2), dtype="<i8")
        return np.memmap(path, dtype="<i8", mode="r").reshape(-1, 2)


_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def canonical_json(value: Any) -> str:
    """One text for equal values: keys sorted, no spaces, characters written out."""
    return _ENCODER.encode(value)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = {}
    if index.get("format") != FORMAT:
        raise StorageError(
            f"{folder} is not a whole store of format {FORMAT}", fix="delete the folder; it is made anew"
        )
    return index
