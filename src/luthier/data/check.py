"""The check: every row of a dataset, from the file to what the engine would train on, with what is wrong by line.

Two passes over the files, each holding one row at a time. The survey reads and parses; it keeps 8 bytes a row, from
which duplicates, overlap and the hold-out follow. The rendering makes examples and hands them to a sink: nothing for a
mere check, the stores for a run. So what is checked is what is trained on.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.files import open_rows
from luthier.data.lines import LineProblem, Row
from luthier.data.report import DataReport, LongRow, PartReport, Repeat
from luthier.data.rows import RowError, preview
from luthier.data.split import duplicates, held_out, record_hash
from luthier.data.store import canonical_json
from luthier.data.template import Renderer
from luthier.data.warn import find_warnings
from luthier.errors import DataError
from luthier.recipe import DataConfig
from luthier.tasks.shapes import Shaper, recognize
from luthier.tasks.task import Task, Truncation
from luthier.types import NO_CLASS, Example

PartName = Literal["train", "validation"]

NUM_REPEATS_SHOWN = 5
NUM_LONGEST_SHOWN = 5
PROGRESS_EVERY_ROWS = 256
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """One row that holds, as a sink receives it.

    Attributes:
        part: The side it is on.
        place: Where it stands, as in "train.jsonl, line 7".
        index: Its index among the rows of its files, as in `Example.row`.
        record: The task's record.
        examples: What the engine trains on; empty when the row is left out for its length, or without a base.
    """

    part: PartName
    place: str
    index: int
    record: Any
    examples: list[Example]


Sink = Callable[[CheckedRow], None]
Progress = Callable[[str, int], None]
"""Called with the stage ("reading" or "tokenizing") and the number of rows done in it."""


def check_data(
    data: DataConfig,
    task: Task,
    renderer: Renderer | None,
    *,
    max_length: int,
    truncation: Truncation = "end",
    seed: int = 42,
    sink: Sink | None = None,
    on_progress: Progress | None = None,
) -> DataReport:
    """Check all rows of a dataset and report; bad rows are in the report, not raised.

    Args:
        data: The files and how their rows are shaped.
        task: What the rows are read as.
        renderer: Tokenizer and chat template of the base, or None to leave tokens out.
        max_length: Most tokens in one example.
        truncation: What happens to a longer one.
        seed: Seeds the hold-out.
        sink: Receives every row that holds, in order.
        on_progress: Told of the progress now and then.

    Raises:
        DataError: for a file that cannot be read at all, or a dataset without a row.
        ModelError: where the base has no chat template and the task needs one.
    """
    check = DataCheck(data, task, renderer, max_length, truncation, seed, on_progress)
    check.survey()
    check.render(sink)
    return check.report


class DataCheck:
    """The two passes of a check, for callers that stop between them; see `check_data` for the arguments.

    Attributes:
        report: Grows with each pass.
        task: The task, with its classes settled once `survey` is done.
    """

    def __init__(
        self,
        data: DataConfig,
        task: Task,
        renderer: Renderer | None,
        max_length: int,
        truncation: Truncation,
        seed: int,
        on_progress: Progress | None = None,
    ) -> None:
        self.task = task
        self.report = DataReport(task=task.name, format=data.format, tokenized=renderer is not None)
        self._data = data
        self._shaper = Shaper(task.name, data.format, data.fields, data.template)
        self._renderer = renderer
        self._max_length = max_length
        self._truncation = truncation
        self._seed = seed
        self._on_progress = on_progress or (lambda stage, num_rows: None)
        self._repeats = _Repeats()
        self._marked: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)

    def survey(self) -> None:
        """Read and parse every row; settle the classes, the hold-out, duplicates and overlap.

        Raises:
            DataError: as `check_data`.
        """
        report, share = self.report, self._data.validation
        report.train.files = train_files(self._data)
        hashes, classes = self._survey_files(report.train.files, self.task)
        if not len(hashes) and not report.num_problems:
            raise DataError(f"{report.train.files[0]} holds no rows", "at least one row", "write the rows into it")
        self._settle_classes(classes)
        doubled = duplicates(hashes)
        report.num_duplicates = int(doubled.sum())
        self._repeats.want("train", np.flatnonzero(doubled), hashes)
        self._marked = held_out(hashes, share if isinstance(share, float) else 0.0)
        if isinstance(share, str):
            self._survey_validation(share, hashes)
        elif self._marked.any():
            report.validation = PartReport(files=report.train.files)
        elif share and len(hashes):
            report.warnings.append(
                "nothing is held out: there are too few different rows, so nobody can tell whether the model got better"
            )

    def render(self, sink: Sink | None = None) -> None:
        """Make every row's examples, count them, and hand them to `sink`.

        Raises:
            DataError: when every row is left out for its length.
        """
        report = self.report
        parts = {"train": _PartCounter(report.train)}
        for row in self._rows(report.train.files, self.task, lambda problem: None, "tokenizing"):
            part: PartName = "validation" if self._marked[row.index] else "train"
            if part not in parts and report.validation:
                parts[part] = _PartCounter(report.validation)
            self._repeats.meet("train", row)
            self._render_row(part, row, parts[part], sink)
        if report.validation and isinstance(self._data.validation, str):
            parts["validation"] = counter = _PartCounter(report.validation)
            for row in self._rows(report.validation.files, self.task, lambda problem: None, "tokenizing"):
                self._repeats.meet("validation", row)
                self._render_row("validation", row, counter, sink)
        for counter in parts.values():
            counter.finish()
        report.duplicates, report.overlapping = self._repeats.found["train"], self._repeats.found["validation"]
        order = {name: index for index, name in enumerate(report.train.files)}
        report.problems.sort(key=lambda problem: (order.get(problem.file, len(order)), problem.line))
        if self._renderer and report.train.num_rows and not report.train.num_examples and not report.num_problems:
            raise DataError(
                f"every training row is longer than train.max_length ({self._max_length} tokens) and left out",
                fix="raise train.max_length, or cut rows with `train.truncation: end`",
            )
        report.warnings += find_warnings(report, self._max_length)

    def _settle_classes(self, classes: Counter[str]) -> None:
        labels = list(self.task.labels) or sorted(classes)
        if self.task.objective in ("token_head", "multilabel_head"):
            self._settle_any(labels)
        elif len(labels) > 1:
            self.task = self.task.with_labels(labels)
        elif labels and self.report.num_problems:
            self._stop_rendering()  # the other classes may be in the rows that do not hold yet
        elif labels:
            raise DataError(
                f"all rows of {', '.join(self.report.train.files)} have the label {labels[0]!r}",
                "two labels or more, to tell apart",
                "add rows of other classes, or map another column with data.fields, as in {label: category}",
            )
        self.report.labels = labels

    def _settle_any(self, labels: list[str]) -> None:
        """Types of entities, or labels of which a text may have none: one is enough."""
        if labels:
            self.task = self.task.with_labels(labels)
        elif self.report.num_problems:
            self._stop_rendering()
        else:
            thing, things, example = (
                ("an entity", "entities", "{tags: ner_tags}")
                if self.task.objective == "token_head"
                else ("a label", "labels", "{label: categories}")
            )
            raise DataError(
                f"no row of {', '.join(self.report.train.files)} holds {thing}",
                "one or more to learn",
                f"add rows with {things}, or map the right column with data.fields, as in {example}",
            )

    def _stop_rendering(self) -> None:
        self._renderer = None
        self.report.tokenized = False

    def _survey_files(self, files: Sequence[str], task: Task) -> tuple[NDArray[np.uint64], Counter[str]]:
        """uint64 [num_rows] hashes of the rows that hold, and how often each class occurs."""
        hashes = array("Q")
        classes = Counter[str]()
        for row in self._rows(files, task, self.report.add, "reading"):
            hashes.append(row.hash)
            classes.update(task.labels_of(row.record))
        return np.array(hashes, dtype=np.uint64), classes

    def _survey_validation(self, file: str, train_hashes: NDArray[np.uint64]) -> None:
        report = self.report
        report.validation = PartReport(files=[file])
        hashes, _ = self._survey_files([file], self.task)
        if not len(hashes) and not report.num_problems:
            raise DataError(f"{file} holds no rows", "at least one row", "write the rows into it, or hold out a share")
        shared = np.isin(hashes, train_hashes)
        report.num_overlapping = int(shared.sum())
        self._repeats.want("validation", np.flatnonzero(shared), hashes)

    def _rows(
        self, files: Sequence[str], task: Task, on_problem: Callable[[LineProblem], None], stage: str
    ) -> Iterator[_ParsedRow]:
        """Every row that holds, in order; the others go to `on_problem`."""
        index = 0
        for file in files:
            for item in open_rows(file):
                if isinstance(item, LineProblem):
                    on_problem(item)
                    continue
                if index == 0 and self.report.format == "auto":
                    self.report.format = self._recognize(item)
                try:
                    record = task.parse(self._shaper.shape(item.values))
                    digest = _record_digest(record, self._seed)
                except RowError as error:
                    on_problem(_as_problem(error, file, item.line, item.place))
                    continue
                yield _ParsedRow(file, item.line, item.place, index, record, digest)
                index += 1
                if index % PROGRESS_EVERY_ROWS == 0:
                    self._on_progress(stage, index)
        self._on_progress(stage, index)

    def _recognize(self, row: Row) -> str:
        columns = [*row.values, *self._data.fields, *self._data.template]
        return recognize(columns, self.task.name) or "auto"

    def _render_row(self, part: PartName, row: _ParsedRow, counter: _PartCounter, sink: Sink | None) -> None:
        examples: list[Example] = []
        num_tokens = 0
        if self._renderer:
            try:
                examples = self._examples(row, self._max_length, self._truncation)
                full = examples
                if not examples or any(max(example.lengths) >= self._max_length for example in examples):
                    full = self._examples(row, NO_LIMIT, "end")
            except RowError as error:
                self.report.add(_as_problem(error, row.file, row.line, row.place))
                return
            num_tokens = max((length for example in full for length in example.lengths), default=0)
            counter.add_examples(examples, full)
        counter.add_row(row.full_place, num_tokens, self.task.labels_of(row.record))
        if sink:
            sink(CheckedRow(part, row.full_place, row.index, row.record, examples))

    def _examples(self, row: _ParsedRow, max_length: int, truncation: Truncation) -> list[Example]:
        assert self._renderer is not None
        return self.task.examples(row.record, self._renderer, max_length, truncation, row.index)


@dataclass(frozen=True, slots=True)
class _ParsedRow:
    file: str
    line: int
    place: str
    index: int
    record: Any
    hash: int

    @property
    def full_place(self) -> str:
        return f"{Path(self.file).name}, {self.place}"


@dataclass
class _Repeats:
    """Finds where the first few repeated rows stand, and where their content stands first."""

    found: dict[PartName, list[Repeat]] = field(default_factory=lambda: {"train": [], "validation": []})
    _wanted_rows: dict[PartName, set[int]] = field(default_factory=dict)
    _first_places: dict[int, str] = field(default_factory=dict)

    def want(self, part: PartName, rows: NDArray[np.intp], hashes: NDArray[np.uint64]) -> None:
        shown = [int(row) for row in rows[:NUM_REPEATS_SHOWN]]
        self._wanted_rows[part] = set(shown)
        self._first_places |= {int(hashes[row]): "" for row in shown}

    def meet(self, part: PartName, row: _ParsedRow) -> None:
        if row.index in self._wanted_rows.get(part, ()):
            self.found[part].append(Repeat(row.full_place, self._first_places[row.hash]))
        elif part == "train" and self._first_places.get(row.hash) == "":
            self._first_places[row.hash] = row.full_place


class _PartCounter:
    """Adds rows up into a PartReport."""

    def __init__(self, part: PartReport) -> None:
        self._part = part
        self._longest: list[tuple[int, int, str]] = []

    def add_row(self, place: str, num_tokens: int, labels: Sequence[str]) -> None:
        part = self._part
        part.num_rows += 1
        part.classes.update(labels)
        # Among equally long rows the first ones stay.
        heapq.heappush(self._longest, (num_tokens, -part.num_rows, place))
        if len(self._longest) > NUM_LONGEST_SHOWN:
            heapq.heappop(self._longest)

    def add_examples(self, examples: list[Example], full: list[Example]) -> None:
        part = self._part
        num_tokens = sum(example.num_tokens for example in examples)
        part.num_examples += len(examples)
        part.num_tokens += num_tokens
        part.num_supervised_tokens += sum(_num_supervised(example) for example in examples)
        part.lengths.update(length for example in examples for length in example.lengths)
        if not examples:
            part.num_dropped += 1
        elif num_tokens < sum(example.num_tokens for example in full):
            part.num_cut += 1

    def finish(self) -> None:
        ordered = sorted(self._longest, reverse=True)
        self._part.longest = [LongRow(place, num_tokens) for num_tokens, _, place in ordered if num_tokens]


def _num_supervised(example: Example) -> int:
    """Tokens that carry loss, or have a tag."""
    tags = 0 if example.tags is None else int(np.count_nonzero(example.tags != NO_CLASS))
    return int(np.count_nonzero(example.weights)) + tags


def train_files(data: DataConfig) -> list[str]:
    """The training files, also where the recipe names only one."""
    return [data.train] if isinstance(data.train, str) else list(data.train)


def _record_digest(record: Any, seed: int) -> int:
    try:
        values = record.to_json()
        canonical = canonical_json(values)
    except (TypeError, ValueError) as error:
        raise RowError(
            "",
            f"the row holds a value that JSON cannot: {preview(str(error))}",
            "texts, numbers, truth values, lists and objects",
            "write such values as texts",
        ) from None
    # JSON writes the character so; a text may also hold these six letters themselves, so its place is looked for.
    if "\\u0000" in canonical and (where := _null_character_in(values)):
        raise RowError(
            where,
            "holds a null character (U+0000)",
            "text",
            "the file was damaged, or bytes were read as text; take the character out, or the row",
        )
    return record_hash(canonical, seed)


def _null_character_in(value: Any, where: str = "") -> str:
    """The path of the first text in a record that holds a null character, or an empty string."""
    if isinstance(value, str):
        return where if "\0" in value else ""
    if isinstance(value, dict):
        inside = [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
    else:
        items = value if isinstance(value, list | tuple) else ()
        inside = [(f"{where}[{index}]", item) for index, item in enumerate(items)]
    return next(filter(None, (_null_character_in(item, name) for name, item in inside)), "")


def _as_problem(error: RowError, file: str, line: int, place: str) -> LineProblem:
    return LineProblem(line, error.found, error.expected, error.fix, error.kind, error.field, file, place)
