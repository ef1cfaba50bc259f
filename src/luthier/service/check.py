"""Looking at a job's files when it is created: what is wrong is answered at once, by line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from luthier.data.check import DataCheck
from luthier.data.encoders import check_encoder_task
from luthier.data.report import DataReport
from luthier.data.template import Renderer
from luthier.errors import DataError, LuthierError, RecipeError
from luthier.recipe import DataConfig, JobSpec
from luthier.registry.problems import InvalidRequestError
from luthier.store.blobs import Blobs
from luthier.store.tables import File
from luthier.tasks.registry import task_for

MIN_EXAMPLES = 10
MAX_BYTES_AT_ONCE = 32 * 2**20
"""Larger files are looked at by the worker: the job is made, and fails with the line if one is wrong."""
MAX_BYTES_TOKENIZED = 2 * 2**20
BYTES_PER_TOKEN = 4
NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Looked:
    """What was seen.

    Attributes:
        num_rows: Training rows; for files that were not read, a guess from their size.
        num_tokens: Tokens of one epoch; a guess from the size where they were not counted.
        is_whole: Whether every line of both files was looked at.
    """

    num_rows: int
    num_tokens: int
    is_whole: bool


def look_at(
    spec: JobSpec,
    train: File,
    validation: File | None,
    hold_out: float,
    *,
    blobs: Blobs,
    renderer: Renderer | None,
    scratch: Path,
) -> Looked:
    """Check a job's files.

    Raises:
        InvalidRequestError: naming the first lines that cannot be trained on; or for a task that the base cannot learn.
    """
    if renderer is not None and renderer.sep_id is not None:
        try:
            check_encoder_task(spec.task.type, task_for(spec.task).objective)
        except RecipeError as error:
            raise InvalidRequestError(f"{error.found}; expected {error.expected}.", param="model") from None
    for file, param in ((train, "training_file"), (validation, "validation_file")):
        if file is not None and file.purpose != "fine-tune":
            raise InvalidRequestError(
                f"{file.id} has the purpose {file.purpose!r}; upload it with purpose 'fine-tune'.", param=param
            )
        if file is not None and file.num_bytes == 0:
            raise InvalidRequestError(f"{file.filename} is empty.", param=param, code=f"invalid_{param}")
    num_bytes = train.num_bytes + (validation.num_bytes if validation is not None else 0)
    if num_bytes > MAX_BYTES_AT_ONCE:
        return Looked(max(MIN_EXAMPLES, train.num_bytes // 1_000), train.num_bytes // BYTES_PER_TOKEN, False)
    with blobs.local(train.blob, "train.jsonl", scratch) as train_path:
        if validation is None:
            return _check(spec, {str(train_path): train}, str(train_path), hold_out, renderer)
        with blobs.local(validation.blob, "validation.jsonl", scratch) as validation_path:
            files = {str(train_path): train, str(validation_path): validation}
            return _check(spec, files, str(train_path), str(validation_path), renderer)


def _check(
    spec: JobSpec, files: dict[str, File], train: str, validation: str | float, renderer: Renderer | None
) -> Looked:
    num_bytes = sum(file.num_bytes for file in files.values())
    used = renderer if num_bytes <= MAX_BYTES_TOKENIZED else None
    data = DataConfig(train=train, validation=validation or None)
    check = DataCheck(data, task_for(spec.task), used, spec.train.max_length, spec.train.truncation, spec.train.seed)
    try:
        check.survey()
        _refuse_problems(check.report, files, train)
        check.render()
        _refuse_problems(check.report, files, train)
    except LuthierError as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(
            _named(error.message if not isinstance(error, DataError) else error.found, files),
            param="training_file",
            code="invalid_training_file",
        ) from None
    report = check.report
    num_rows = report.train.num_rows
    held_out = report.validation.num_rows if report.validation and not isinstance(validation, str) else 0
    if num_rows + held_out < MIN_EXAMPLES:
        raise InvalidRequestError(
            f"{files[train].filename} has {num_rows + held_out} examples, but a job needs at least {MIN_EXAMPLES}.",
            param="training_file",
            code="invalid_n_examples",
        )
    num_tokens = report.train.num_tokens if report.tokenized and used else files[train].num_bytes // BYTES_PER_TOKEN
    return Looked(num_rows, num_tokens, used is not None and report.tokenized)


def _refuse_problems(report: DataReport, files: dict[str, File], train: str) -> None:
    if not report.num_problems:
        return
    shown = [
        _named(replace(p, file=files[p.file].filename if p.file in files else "").message, files)
        for p in report.problems[:NUM_SHOWN]
    ]
    rest = report.num_problems - len(shown)
    text = f"{report.num_problems:,} rows cannot be trained on: " + "; ".join(shown)
    param = "training_file" if any(p.file == train for p in report.problems) else "validation_file"
    raise InvalidRequestError(text + (f"; and {rest:,} more." if rest else "."), param=param, code=f"invalid_{param}")


def _named(text: str, files: dict[str, File]) -> str:
    """The message with the files' own names in place of where they lie here."""
    for path, file in files.items():
        text = text.replace(path, file.filename).replace(Path(path).name, file.filename)
    return text
