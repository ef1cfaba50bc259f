"""Predictions of a run's model for the rows of a file, as JSON lines.

    {"row": 0, "line": 1, ...what the task presents}
    {"row": 1, "line": 2, "error": "..."}

Rows are read in chunks, so that memory stays flat; within a chunk they run in batches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from luthier.data.files import open_rows
from luthier.data.lines import LineProblem
from luthier.data.rows import RowError
from luthier.engine.scoring import score_examples
from luthier.errors import RunError
from luthier.files import atomic_file
from luthier.tasks.classification.words import WordsTask
from luthier.tasks.registry import head_of, task_for
from luthier.tasks.shapes import Shaper
from luthier.tasks.task import Task
from luthier.tasks.text.metrics import perplexity
from luthier.types import Example, Prompt
from luthier.worker.choosing import choose_labels
from luthier.worker.judge import write_replies
from luthier.worker.loading import Tuned, load_tuned, placement_of
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.run_folder import RunFolder

CHUNK_ROWS = 512
"""Rows in memory at a time."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """How many rows were read, and how many of them could not be predicted for."""

    num_rows: int
    num_errors: int


@dataclass
class _Row:
    """A row on its way: either it has a problem, or a record."""

    line: int
    record: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def predict_file(
    run: str | Path,
    data: str | Path,
    output: str | Path | None = None,
    *,
    max_new_tokens: int = 256,
    progress: Progress | None = None,
) -> Predicted:
    """Write a line for each row of `data`, in order.

    Args:
        run: A finished run's folder.
        data: Rows as the run's recipe shapes them; the answer may be missing.
        output: The file to write, whole or not at all; None writes to standard output as predictions come.
        max_new_tokens: Longest reply of a task that writes.

    Raises:
        RunError: when the run has made nothing yet.
        DataError: for a file that cannot be read at all.
        StorageError: when `output` cannot be written.
    """
    progress = progress or SilentProgress()
    folder = RunFolder.open(run)
    recipe = folder.recipe()
    rows = open_rows(data)
    task = _settled(task_for(recipe.task), folder)
    shaper = Shaper(task.name, recipe.data.format, recipe.data.fields, recipe.data.template)
    progress.stage("Loading the model")
    tuned = load_tuned(folder, recipe, placement_of(recipe, progress.note))
    predictor = _Predictor(task, tuned, recipe.train.max_length, max_new_tokens)
    num_rows = num_errors = 0
    with _opened(output) as stream:
        progress.stage(f"Predicting for {data}")
        parsed = (_parse(item, task, shaper) for item in rows)
        while chunk := list(islice(parsed, CHUNK_ROWS)):
            predictor.fill(chunk)
            for row in chunk:
                values = {"error": row.problem} if row.problem else row.values
                line = {"row": num_rows, "line": row.line, **values}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                num_rows += 1
                num_errors += bool(row.problem)
            progress.evaluation(str(run), "predictions", num_rows, num_rows)
    return Predicted(num_rows, num_errors)


class _Predictor:
    """Predicts for chunks of rows with one model."""

    def __init__(self, task: Task, tuned: Tuned, max_length: int, max_new_tokens: int) -> None:
        self.task = task
        self.tuned = tuned
        self.max_length = max_length
        self.max_new_tokens = max_new_tokens

    def fill(self, rows: list[_Row]) -> None:
        """Give each row its values, or say why it has none."""
        if isinstance(self.task, WordsTask):
            self._choose(rows, self.task)
        elif self.task.generates:
            self._write(rows)
        else:
            self._read(rows)

    def _write(self, rows: list[_Row]) -> None:
        base, renderer = self.tuned.base, self.tuned.renderer
        asked: list[tuple[_Row, Prompt]] = []
        for row in _without_problem(rows):
            try:
                (prompt,) = self.task.prompts(row.record, renderer)
            except RowError as error:
                row.problem = error.message
                continue
            most = base.max_positions
            if most is not None and len(prompt.tokens) >= most:
                row.problem = f"the prompt has {len(prompt.tokens):,} tokens; expected fewer than {most:,}"
                continue
            asked.append((row, prompt))
        prompts = [prompt for _, prompt in asked]
        replies = write_replies(base, renderer, prompts, self.tuned.slot, self.max_new_tokens)
        for (row, _), reply in zip(asked, replies, strict=True):
            row.values = self.task.present(row.record, reply)

    def _choose(self, rows: list[_Row], task: WordsTask) -> None:
        base, renderer = self.tuned.base, self.tuned.renderer
        asked: list[_Row] = []
        for row in _without_problem(rows):
            try:
                prompt, answers = task.answers(row.record, renderer)
            except RowError as error:
                row.problem = error.message
                continue
            most, longest = base.max_positions, len(prompt) + max(map(len, answers))
            if most is not None and longest > most:
                row.problem = f"the text and a label have {longest:,} tokens; expected at most {most:,}"
                continue
            asked.append(row)
        found = choose_labels(base, renderer, task, [row.record for row in asked], self.tuned.slot)
        for row, given in zip(asked, found, strict=True):
            row.values = task.present(row.record, task.read(row.record, renderer, self.max_length, [given]))

    def _read(self, rows: list[_Row]) -> None:
        base, renderer = self.tuned.base, self.tuned.renderer
        owners: list[_Row] = []
        examples: list[Example] = []
        for row in _without_problem(rows):
            try:
                found = self.task.queries(row.record, renderer, self.max_length)
            except RowError as error:
                row.problem = error.message
                continue
            owners += [row] * len(found)
            examples += found
        reports: dict[int, list[Any]] = {}
        for row, report in zip(owners, score_examples(base, examples, self.tuned.slot), strict=True):
            reports.setdefault(id(row), []).append(report)
        for row in _without_problem(rows):
            own = reports[id(row)]
            if head_of(self.task) is None:
                prediction: Any = document_loss(own)
            else:
                given = [report.probabilities_CK for report in own]
                prediction = self.task.read(row.record, renderer, self.max_length, given)
            row.values = self.task.present(row.record, prediction)


def document_loss(reports: list[Any]) -> dict[str, float]:
    """What a document is worth to a model without a head."""
    num_tokens = sum(report.num_targets for report in reports)
    loss = sum(report.nll_sum for report in reports) / max(1.0, sum(report.weight_sum for report in reports))
    return {"loss": round(loss, 6), "perplexity": round(perplexity(loss), 6), "num_tokens": num_tokens}


def _without_problem(rows: list[_Row]) -> list[_Row]:
    return [row for row in rows if not row.problem]


def _parse(item: Any, task: Task, shaper: Shaper) -> _Row:
    if isinstance(item, LineProblem):
        return _Row(item.line, problem=item.message)
    try:
        return _Row(item.line, task.parse_query(shaper.shape(item.values, is_query=True)))
    except RowError as error:
        return _Row(item.line, problem=error.message)


def _settled(task: Task, folder: RunFolder) -> Task:
    """The task with the classes that the run's data had."""
    if head_of(task) is None and not task.chooses:
        return task
    report = folder.read_json("data.json")
    if report is None:
        raise RunError(f"{folder.path} has no data.json, which names the classes", fix="take a run that is whole")
    return task.with_labels(report["labels"])


@contextmanager
def _opened(output: str | Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    with atomic_file(Path(output)) as stream:
        yield stream
