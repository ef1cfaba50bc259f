"""A job of the service: a `Run` in a folder that can be lost, whose steps, checkpoints and end go into the record."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.base.load import Base
from luthier.checkpoints.checkpoint import checkpoint_folder
from luthier.engine.job import StepReport, TrainingJob
from luthier.engine.slot import Slot
from luthier.recipe import Recipe, validate
from luthier.registry.seam import CheckpointRecord, ClaimedJob, Form, JobResult, StepRecord
from luthier.store.blobs import Blobs
from luthier.tasks.preference.metrics import PREFERENCE_ACCURACY
from luthier.tasks.registry import head_of
from luthier.worker.progress import SilentProgress
from luthier.worker.run import Run
from luthier.worker.run_folder import resolved_versions
from luthier.worker.task_file import write_task

SCORES = "scores"
"""Folder of what the base did on each held-out row: in a run, and beside a checkpoint's files, so that whoever goes on
from it need not ask the base again, which a job that trains its weights could not."""
ACCURACIES = ("token_accuracy", "accuracy", "tag_accuracy", PREFERENCE_ACCURACY)
SAVE_SECONDS = 60.0
"""A job saves at least this often: what a dead worker loses at most."""


@dataclass
class SavedFiles:
    """A checkpoint's or adapter's files, linked aside so that pruning does not touch them while they are copied."""

    folder: Path
    prefix: str

    def to_dict(self) -> dict[str, str]:
        return {"folder": str(self.folder), "prefix": self.prefix}

    @classmethod
    def from_dict(cls, values: dict[str, str]) -> SavedFiles:
        return cls(Path(values["folder"]), values["prefix"])

    def put(self, blobs: Blobs) -> tuple[str, int]:
        """Copy them into the store, and forget them here; returns digest and size."""
        written = blobs.put_folder(self.prefix, self.folder)  # where this fails, the files stay to be tried again
        shutil.rmtree(self.folder, ignore_errors=True)
        return written.sha256, written.num_bytes


@dataclass(frozen=True)
class JobFiles:
    """A claimed job whose files are here, and its recipe over them.

    Attributes:
        folder: Where all of them lie.
    """

    claimed: ClaimedJob
    folder: Path
    recipe: Recipe

    @property
    def checkpoints(self) -> Path:
        """The checkpoints to resume from, until the run's folder takes them."""
        return self.folder / "checkpoints"

    @classmethod
    def fetch(cls, claimed: ClaimedJob, blobs: Blobs, scratch: Path, source: str) -> JobFiles:
        """Fetch them.

        Args:
            source: What the recipe names as the base.

        Raises:
            LuthierError: for files that are gone, or a spec that does not hold.
        """
        folder = scratch / "jobs" / claimed.claim.job
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = cls(claimed, folder, _recipe(claimed, blobs, folder, source))
        for prefix in claimed.checkpoints:
            files.checkpoints.mkdir(exist_ok=True)
            blobs.get_folder(prefix, files.checkpoints / prefix.rsplit("/", 1)[-1])
        return files


@dataclass
class RecordedRun:
    """One claimed job. Made by `begin`, in any thread; all else happens in the thread that runs the base."""

    claimed: ClaimedJob
    run: Run
    folder: Path
    saved_at: float = field(default_factory=time.monotonic)
    last_report: StepReport | None = None

    @classmethod
    def begin(cls, files: JobFiles, base_folder: Path) -> RecordedRun:
        """Check and render the job's data, and put its last checkpoint where the run looks for it.

        Raises:
            LuthierError: for data that does not hold.
        """
        run = Run.begin(files.recipe, base_folder, SilentProgress(), resume=False)
        run.writes_report = False
        run.resumed = bool(files.claimed.checkpoints)
        if run.resumed:
            for kept in files.checkpoints.glob(f"*/{SCORES}"):
                shutil.rmtree(run.folder.path / SCORES, ignore_errors=True)
                kept.replace(run.folder.path / SCORES)
            files.checkpoints.replace(run.folder.checkpoints)
        return cls(files.claimed, run, files.folder)

    @property
    def id(self) -> str:
        return self.claimed.claim.job

    @property
    def job(self) -> TrainingJob:
        return self.run.job

    @property
    def slot(self) -> Slot:
        """The job's slot in the bank; an exclusive job runs in a child, which never asks."""
        slot = self.run.job.slot
        assert isinstance(slot, Slot), "an exclusive job came to the bank"
        return slot

    def admit(self, base: Base, score_tokens: int, between: Callable[[], None]) -> TrainingJob:
        """Give the job its slot. Raises as `Run.admit` does."""
        self.run.score_tokens, self.run.between = score_tokens, between
        return self.run.admit(base)

    @property
    def num_rows(self) -> int:
        return self.run.data.report.train.num_rows

    @property
    def num_tokens(self) -> int:
        return self.run.data.examples.total_tokens

    def on_step(self, report: StepReport) -> StepRecord:
        """Let the run see to a step, and say what happened in it."""
        self.last_report = report
        self.run.on_step(report)
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.run.save()
        valid = self.run.last_validation if self.run.last_validation.get("step") == report.step else {}
        return StepRecord(
            report.step,
            self.job.total_steps,
            report.loss,
            report.num_tokens,
            report.learning_rate,
            train_accuracy=self._train_accuracy,
            valid_loss=valid.get("loss"),
            valid_accuracy=_accuracy(valid),
        )

    @property
    def _train_accuracy(self) -> float | None:
        """Of the last step. Of any number of labels there is none: what is right depends on the threshold."""
        if self.last_report is None or head_of(self.run.data.task) == "multilabel":
            return None
        return self.last_report.accuracy

    def take_checkpoint(self) -> tuple[SavedFiles, CheckpointRecord] | None:
        """The checkpoint of the current step, if there is one that was not taken yet."""
        step = self.job.step
        path = checkpoint_folder(self.run.folder.checkpoints, step)
        mark = self.folder / f"taken-{step}"
        if not path.exists() or mark.exists():
            return None
        mark.touch()
        self.saved_at = time.monotonic()
        name = f"tenants/{self.claimed.tenant}/jobs/{self.id}/{self.claimed.claim.epoch}/{path.name}"
        files = self._aside(path, name)
        for kept in (self.run.folder.path / SCORES).glob("base*.json"):
            (files.folder / SCORES).mkdir(exist_ok=True)
            shutil.copyfile(kept, files.folder / SCORES / kept.name)
        metrics: dict[str, float] = {"step": step}
        if self.last_report is not None:
            metrics["train_loss"] = self.last_report.loss
        if (accuracy := self._train_accuracy) is not None:
            metrics["train_mean_token_accuracy"] = accuracy
        if self.run.last_validation.get("step") == step:
            valid = self.run.last_validation
            metrics["full_valid_loss"] = metrics["valid_loss"] = valid["loss"]
            if (accuracy := _accuracy(valid)) is not None:
                metrics["full_valid_mean_token_accuracy"] = metrics["valid_mean_token_accuracy"] = accuracy
        return files, CheckpointRecord(step, name, "", 0, metrics, self.run.best.step)

    def take_result(self, peak_memory_bytes: int, device: str) -> tuple[SavedFiles, JobResult]:
        """Finish the run; what is left is to store its adapter."""
        result = self.run.finish(peak_memory_bytes, device)
        name = f"tenants/{self.claimed.tenant}/models/{self.id}-{self.claimed.claim.epoch}"
        form: Form = (
            "model" if not result.has_adapter else "adapter" if self.run.recipe.method.runs == "bank" else "layers"
        )
        files = self._aside(result.tuned, name)
        lineage: dict[str, Any] = {
            "base_sha256": result.result["base_sha256"],
            "data_sha256": result.result["data_sha256"],
            "best_step": result.result["best_step"],
            "labels": list(self.run.data.task.outputs),
            "versions": resolved_versions(),
        }
        return files, JobResult(name, "", 0, lineage, result.evaluation, self.job.step, form)

    def save(self) -> None:
        """Save the last whole step; what was gathered of the next is dropped."""
        self.run.interrupt()

    def drop(self) -> None:
        """Forget the job's files here."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def public(self, message: str) -> str:
        """A message without places of this machine in it."""
        return public(message, self.folder)

    def _aside(self, folder: Path, prefix: str) -> SavedFiles:
        # Not under the job's folder: a copy goes on after the job has been dropped.
        target = self.folder.parent.parent / "outgoing" / secrets.token_hex(8)
        shutil.copytree(folder, target, copy_function=_link)
        write_task(target, self.run.recipe.task, self.run.data.task, self.run.recipe.train.max_length)
        return SavedFiles(target, prefix)


def _accuracy(validation: dict[str, float]) -> float | None:
    """What the surface calls token accuracy: of tokens, or of classes, tags or pairs where a task has those instead."""
    return next((validation[name] for name in ACCURACIES if name in validation), None)


def public(message: str, folder: Path) -> str:
    """A message about a job whose files lie in `folder`, without places of this machine in it."""
    return message.replace(f"{folder}/run", "the job").replace(f"{folder}/", "")


def _recipe(claimed: ClaimedJob, blobs: Blobs, folder: Path, source: str) -> Recipe:
    train = _copy(blobs, claimed.train_file, folder / "train.jsonl")
    validation: str | float | None = claimed.hold_out or None
    if claimed.validation_file is not None:
        validation = str(_copy(blobs, claimed.validation_file, folder / "validation.jsonl"))
    start = None
    if claimed.start_from is not None:
        blobs.get_folder(claimed.start_from, folder / "start")
        start = str(folder / "start")
    values = {
        **claimed.spec,
        "base": source,
        "data": {"train": str(train), "validation": validation},
        "start_from": start,
        "output": str(folder / "run"),
    }
    return validate(Recipe, values, "the job")


def _copy(blobs: Blobs, key: str, target: Path) -> Path:
    with target.open("wb") as file:
        for piece in blobs.pieces(key):
            file.write(piece)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
