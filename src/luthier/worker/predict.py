"""What a tuned model makes of rows of its task, on the resident base beside training and chat.

Rows are shaped and rendered as in training, in the endpoint's threads. Then, as the task is:

    writes    each row is a reply, run among those of chat
    chooses   the likeliest label of a row at a time
    reads     a head's probabilities, or a text's loss, of a few rows at a time

Between two such portions the thread that runs the base goes on with its other work.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from luthier.base.load import Base
from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.engine.choices import OneOf
from luthier.engine.request import SamplingError
from luthier.engine.scoring import score_examples
from luthier.engine.step import SequenceReport
from luthier.registry.problems import UnavailableError
from luthier.registry.seam import Predictions, PredictRequest, SampleEvent, SampleRequest
from luthier.tasks.classification.words import WordsTask
from luthier.tasks.registry import head_of
from luthier.tasks.shapes import FORMATS, Shaper
from luthier.tasks.task import Probabilities, Task
from luthier.types import Example, Prompt
from luthier.worker.choosing import choose_labels
from luthier.worker.predict_file import document_loss
from luthier.worker.replies import Task as ReplyTask
from luthier.worker.task_file import LearntTask

NUM_REPLIES_AT_ONCE = 16
"""Of one request; the rest of its rows wait, so that it does not fill the worker."""
ANSWER_SECONDS = 600.0
"""How long the thread that runs the base may be silent."""
LOOK_SECONDS = 0.5

Result = TypeVar("Result")


class OnBase(Protocol):
    """What a prediction asks of the thread that runs the base. All verbs are called from another thread."""

    def with_slot(self, act: Callable[[int], Result]) -> Result:
        """Do this there with the index of the model's slot, and wait for it."""

    def submit(self, task: ReplyTask) -> None:
        """Let a reply begin."""

    def check_heard(self) -> None:
        """Raise UnavailableError where the caller has gone away."""


@dataclass(frozen=True)
class Predictor:
    """One model's way from rows to predictions.

    Args:
        folder: The adapter's files; None for what the worker holds as it is.
        max_tokens: Most tokens in one forward.
    """

    base: Base
    renderer: Renderer
    learnt: LearntTask
    folder: Path | None
    on_base: OnBase
    max_tokens: int

    def predict(self, request: PredictRequest) -> Predictions:
        """Predict for every row.

        Raises:
            SamplingError: naming the row that cannot be predicted for; none is then.
        """
        task = self.learnt.task
        records = read_rows(task, request.rows)
        if isinstance(task, WordsTask):
            return self._choose(task, records)
        if task.generates:
            return self._write(task, records, request)
        return self._read(task, records)

    def _read(self, task: Task, records: list[Any]) -> Predictions:
        found: list[list[Example]] = []
        for at, record in enumerate(records):
            with _named(at):
                found.append(task.queries(record, self.renderer, self.learnt.max_length))
        examples = [example for of_row in found for example in of_row]

        def score(part: list[Example], slot: int) -> list[SequenceReport]:
            return score_examples(self.base, part, slot, max_tokens=self.max_tokens)

        own = chain.from_iterable(
            self.on_base.with_slot(partial(score, part)) for part in _portions(examples, self.max_tokens)
        )
        rows = []
        for record, of_row in zip(records, found, strict=True):
            given = list(islice(own, len(of_row)))
            if head_of(task) is None:
                rows.append(task.present(record, document_loss(given)))
                continue
            probabilities = [report.probabilities_CK for report in given if report.probabilities_CK is not None]
            prediction = task.read(record, self.renderer, self.learnt.max_length, probabilities)
            rows.append(_presented(task, record, prediction))
        return Predictions(rows, sum(example.num_tokens for example in examples), 0)

    def _choose(self, task: WordsTask, records: list[Any]) -> Predictions:
        num_tokens = 0
        for at, record in enumerate(records):
            with _named(at):
                tokens, answers = task.answers(record, self.renderer)
            _check_length(at, len(tokens) + max(map(len, answers)), self.base.max_positions)
            num_tokens += len(tokens)

        def choose(record: Any, slot: int) -> Probabilities:
            (given,) = choose_labels(self.base, self.renderer, task, [record], slot, max_tokens=self.max_tokens)
            return given

        rows = []
        for record in records:
            given = self.on_base.with_slot(partial(choose, record))
            prediction = task.read(record, self.renderer, self.learnt.max_length, [given])
            rows.append(_presented(task, record, prediction))
        return Predictions(rows, num_tokens, 0)

    # -- tasks that write

    def _write(self, task: Task, records: list[Any], request: PredictRequest) -> Predictions:
        prompts: list[Prompt] = []
        for at, record in enumerate(records):
            with _named(at):
                (prompt,) = task.prompts(record, self.renderer)
            _check_length(at, len(prompt.tokens) + 1, self.base.max_positions)
            prompts.append(prompt)
        written = self._replies(prompts, request)
        rows = []
        for record, reply in zip(records, written, strict=True):
            is_cut = reply.finish_reason == "length"
            rows.append(task.present(record, reply.text) | ({"finish_reason": "length"} if is_cut else {}))
        return Predictions(rows, sum(len(p.tokens) for p in prompts), sum(reply.num_tokens for reply in written))

    def _replies(self, prompts: list[Prompt], request: PredictRequest) -> list[_Written]:
        """The likeliest reply to each prompt, held to the prompt's choices where it has some."""
        events: queue.Queue[tuple[int, SampleEvent]] = queue.Queue()
        written = [_Written() for _ in prompts]
        waiting = iter(range(len(prompts)))
        open_tasks: dict[int, ReplyTask] = {}

        def begin_next() -> None:
            at = next(waiting, None)
            if at is not None:
                open_tasks[at] = self._reply_task(at, prompts[at], request, lambda event: events.put((at, event)))
                self.on_base.submit(open_tasks[at])

        try:
            for _ in range(NUM_REPLIES_AT_ONCE):
                begin_next()
            while open_tasks:
                at, event = self._next(events)
                if event.problem and event.status >= 500:
                    raise UnavailableError(event.problem)
                if event.problem:
                    raise SamplingError(f"input[{at}]: {event.problem}")
                written[at].text += event.text
                if event.finish_reason is not None:
                    written[at].finish_reason, written[at].num_tokens = event.finish_reason, event.num_tokens
                    del open_tasks[at]
                    begin_next()
        finally:
            for task in open_tasks.values():
                task.is_gone = True
        return written

    def _next(self, events: queue.Queue[tuple[int, SampleEvent]]) -> tuple[int, SampleEvent]:
        for _ in range(int(ANSWER_SECONDS / LOOK_SECONDS)):
            self.on_base.check_heard()
            try:
                return events.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
        raise UnavailableError("the worker did not answer in time; send the request again")

    def _reply_task(
        self, at: int, prompt: Prompt, request: PredictRequest, emit: Callable[[SampleEvent], None]
    ) -> ReplyTask:
        constraint, max_tokens = None, request.max_tokens
        if prompt.choices:
            constraint = OneOf(prompt.choices, self.base.vocabulary_size)
            max_tokens = max(map(len, prompt.choices))
        asked = SampleRequest(f"{request.id}/{at}", request.adapter, max_tokens=max_tokens, temperature=0.0)
        tokens = np.asarray(prompt.tokens, dtype=np.int32)
        return ReplyTask(asked, tokens, self.renderer, self.folder, [constraint], emit)


@dataclass
class _Written:
    """A reply as it grows."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: str = ""


def read_rows(task: Task, rows: list[str | dict[str, Any]]) -> list[Any]:
    """The task's records of rows, or of texts that stand for them.

    Raises:
        SamplingError: naming the row that does not hold.
    """
    shaper, column = Shaper(task.name), text_column(task.name)
    records = []
    for at, row in enumerate(rows):
        with _named(at):
            if isinstance(row, str):
                if column is None:
                    raise RowError("", "is a text", f"an object: a row of task {task.name} without its answer")
                row = {column: row}
            records.append(task.parse_query(shaper.shape(row, is_query=True)))
    return records


def text_column(task: str) -> str | None:
    """The column that a text alone stands for: the one that a row to predict for needs; None where it needs more."""
    shapes = [shape for shape in FORMATS.values() if task in shape.tasks]
    for name in ("text", "source", "prompt"):
        if any(
            shape.needed(True) == (name,) or (not shape.needed(True) and name in shape.may_have) for shape in shapes
        ):
            return name
    return None


@contextmanager
def _named(at: int) -> Iterator[None]:
    """Names the row in what is wrong with it."""
    try:
        yield
    except RowError as error:
        place = f"input[{at}].{error.field}" if error.field else f"input[{at}]"
        raise SamplingError(f"{place} {error.found}", error.expected) from None


def _check_length(at: int, num_tokens: int, most: int | None) -> None:
    if most is not None and num_tokens > most:
        raise SamplingError(f"input[{at}] has {num_tokens:,} tokens with its answer", f"at most {most:,}")


def _portions(examples: list[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Examples, in order, in parts of at most `max_tokens`; a longer one is a part by itself."""
    part: list[Example] = []
    num_tokens = 0
    for example in examples:
        if part and num_tokens + example.num_tokens > max_tokens:
            yield part
            part, num_tokens = [], 0
        part.append(example)
        num_tokens += example.num_tokens
    if part:
        yield part


def _presented(task: Task, record: Any, prediction: Any) -> dict[str, Any]:
    """As `luthier predict` has it, but for probabilities of labels: unrounded, and in the labels' order."""
    row = task.present(record, prediction)
    if "probabilities" in row and isinstance(prediction, Mapping):
        row["probabilities"] = {label: prediction[label] for label in task.labels}
    return row
