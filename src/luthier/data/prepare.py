"""Files -> stores that a run trains on: checked, split, rendered, written once, and found again by content."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.data.check import CheckedRow, DataCheck, Progress, train_files
from luthier.data.files import content_hash
from luthier.data.replay import Mixed, replay_data
from luthier.data.report import DataReport, PartReport, report_from_json
from luthier.data.store import (
    ExampleStore,
    ExampleWriter,
    RecordStore,
    RecordWriter,
    canonical_json,
)
from luthier.data.template import Renderer
from luthier.errors import StorageError
from luthier.files import atomic_folder, writing
from luthier.recipe import DataConfig
from luthier.tasks.task import Task, Truncation

FORMAT = 1
"""Part of every key: raise it when the same rows would become other tokens."""

NUM_TRAIN_RECORDS = 64
"""Training records kept for examples in a prompt."""


@dataclass(frozen=True)
class PreparedData:
    """A dataset ready to train on.

    Attributes:
        train: The training examples.
        validation: The held-out examples, or None when nothing is held out.
        validation_records: The held-out records, for prompts; None exactly when `validation` is.
        train_records: The first training records, at most `NUM_TRAIN_RECORDS`, for examples in a prompt.
        report: What the check found: no problem, perhaps warnings.
        task: The task with its classes settled.
        data_hash: SHA-256 over the contents of the files and how they are split: the data's part of a model's lineage.
        folder: Where all of it lies.
        max_length: Most tokens in one example.
        replay: The replayed text with its own held-out rows; None without.
        mixed: What is trained on where text is replayed; None without.
    """

    train: ExampleStore
    validation: ExampleStore | None
    validation_records: RecordStore | None
    train_records: RecordStore
    report: DataReport
    task: Task
    data_hash: str
    folder: Path
    max_length: int
    replay: PreparedData | None = None
    mixed: Mixed | None = None

    @property
    def examples(self) -> ExampleStore | Mixed:
        """All that is trained on."""
        return self.train if self.mixed is None else self.mixed

    def report_json(self) -> dict[str, Any]:
        """The report as JSON values, that of the replayed text included."""
        values = self.report.to_json()
        if self.replay is not None and self.mixed is not None:
            share = self.mixed.num_replayed_tokens / self.mixed.total_tokens
            values["replay"] = {"share_of_tokens": round(share, 6), **self.replay.report.to_json()}
        return values


def prepare(
    data: DataConfig,
    task: Task,
    renderer: Renderer,
    *,
    max_length: int,
    truncation: Truncation = "end",
    seed: int = 42,
    folder: Path,
    on_progress: Progress | None = None,
) -> PreparedData:
    """Check, split and render a dataset into stores under `folder`, or find them there from an earlier time.

    Args:
        data: The files, the split and how rows are shaped; with `replay` the general text to mix in.
        task: What the rows are read as.
        renderer: Tokenizer and chat template of the base.
        max_length: Most tokens in one example.
        truncation: What happens to a longer one.
        seed: Seeds the hold-out.
        folder: A cache: each dataset has a folder of its own in it, named by all that decides its contents.
        on_progress: Told of the stage and the rows done in it, now and then.

    Raises:
        DataError: when a file cannot be read or any row cannot be trained on; it names the first lines.
        StorageError: when the stores cannot be written; nothing half-written stays.
        ModelError: where the base has no chat template and the task needs one.
        RecipeError: where the task has no place for replayed text.
    """
    settings: dict[str, Any] = {
        "max_length": max_length,
        "truncation": truncation,
        "seed": seed,
        "folder": folder,
        "on_progress": on_progress,
    }
    general = replay_data(data, task)
    own = _prepare_one(data, task, renderer, **settings)
    if general is None or data.replay is None:
        return own
    replay = _prepare_one(general, task, renderer, **settings)
    mixed = Mixed(own.train, replay.train, data.replay.share, seed)
    if mixed.num_passes > 1:
        own.report.warnings.append(
            f"data.replay: {mixed.num_replayed_tokens:,} tokens are replayed in an epoch, and the text has "
            f"{replay.train.total_tokens:,}: some of it repeats within the epoch"
        )
    parts = [own.data_hash, replay.data_hash, data.replay.share]
    data_hash = hashlib.sha256(canonical_json(parts).encode()).hexdigest()
    return replace(own, replay=replay, mixed=mixed, data_hash=data_hash)


def _prepare_one(
    data: DataConfig,
    task: Task,
    renderer: Renderer,
    *,
    max_length: int,
    truncation: Truncation,
    seed: int,
    folder: Path,
    on_progress: Progress | None,
) -> PreparedData:
    """Arguments and errors as `prepare`; replayed text is left aside."""
    data_hash = hash_data(data, seed)
    target = folder / _key(data, data_hash, task, renderer, max_length, truncation)
    found = _load(target, task, data_hash, max_length)
    if found:
        return found
    check = DataCheck(data, task, renderer, max_length, truncation, seed, on_progress)
    check.survey()
    check.report.raise_for_errors()
    with atomic_folder(target) as temporary:
        _write_stores(temporary, check)
        check.report.raise_for_errors()
        index = {"format": FORMAT, "data_hash": data_hash, "report": check.report.to_json()}
        (temporary / "prepared.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    prepared = _load(target, task, data_hash, max_length)
    if not prepared:
        raise StorageError(f"{target} was written and cannot be read back", fix="look after the disk and start again")
    return prepared


def hash_data(data: DataConfig, seed: int) -> str:
    """SHA-256 over the contents of the data files, in order, and how they are split.

    Raises:
        DataError: when a file is missing or empty.
    """
    contents: dict[str, Any] = {"train": [content_hash(file) for file in train_files(data)]}
    if isinstance(data.validation, str):
        contents["validation"] = content_hash(data.validation)
    elif data.validation:
        contents |= {"share": data.validation, "seed": seed}
    return hashlib.sha256(canonical_json(contents).encode()).hexdigest()


def _key(
    data: DataConfig, data_hash: str, task: Task, renderer: Renderer, max_length: int, truncation: Truncation
) -> str:
    parts = {
        "format": FORMAT,
        "data": data_hash,
        # A file's ending decides how it is read.
        "endings": ["".join(Path(file).suffixes[-2:]) for file in (*train_files(data), str(data.validation))],
        "shape": [data.format, data.fields, data.template],
        "task": repr(task),
        "renderer": renderer.fingerprint,
        "max_length": max_length,
        "truncation": truncation,
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:24]


def _write_stores(folder: Path, check: DataCheck) -> None:
    with ExitStack() as stack:
        examples = {
            "train": stack.enter_context(ExampleWriter(folder / "train")),
            "validation": stack.enter_context(ExampleWriter(folder / "validation")),
        }
        records = {
            "train": stack.enter_context(RecordWriter(folder / "train_records")),
            "validation": stack.enter_context(RecordWriter(folder / "validation_records")),
        }

        def write(row: CheckedRow) -> None:
            for example in row.examples:
                examples[row.part].write(example)
            is_kept = row.part == "validation" or records["train"].num_records < NUM_TRAIN_RECORDS
            if is_kept and row.examples:
                records[row.part].write(row.record.to_json(), row.index)

        check.render(write)


def _load(folder: Path, task: Task, data_hash: str, max_length: int) -> PreparedData | None:
    """The dataset of an earlier time; a damaged one is removed, so that it is made anew."""
    if not folder.exists():
        return None
    try:
        report = report_from_json(json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["report"])
        train = ExampleStore(folder / "train")
        validation = ExampleStore(folder / "validation")
        validation_records = RecordStore(folder / "validation_records")
        train_records = RecordStore(folder / "train_records")
    except (OSError, ValueError, KeyError, TypeError, StorageError):
        with writing(folder):
            shutil.rmtree(folder)
        return None
    _restore_lengths(report.train, train)
    if report.validation:
        _restore_lengths(report.validation, validation)
    holds_out = len(validation) > 0
    return PreparedData(
        train=train,
        validation=validation if holds_out else None,
        validation_records=validation_records if holds_out else None,
        train_records=train_records,
        report=report,
        task=task.with_labels(report.labels) if report.labels else task,
        data_hash=data_hash,
        folder=folder,
        max_length=max_length,
    )


def _restore_lengths(part: PartReport, store: ExampleStore) -> None:
    part.lengths = Counter(store.lengths.tolist())
