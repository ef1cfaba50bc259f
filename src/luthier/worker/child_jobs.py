"""Exclusive jobs of the service: each in a process of its own beside the resident base, recorded as the others are."""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.registry.seam import CheckpointRecord, Claim, JobResult, StepRecord, Wish
from luthier.worker.child_process import ChildProcess
from luthier.worker.job_record import JobRecord
from luthier.worker.loading import check_optimizer, placement_of
from luthier.worker.messages import error_of
from luthier.worker.method_fit import check_exclusive_method
from luthier.worker.plan import admission_bytes
from luthier.worker.recorded_run import JobFiles, SavedFiles, public
from luthier.worker.service_training import Order

logger = logging.getLogger("luthier.worker")

MODULE = "luthier.worker.service_child"
POLL_SECONDS = 0.02


@dataclass
class ChildJob:
    """One exclusive job: waiting for memory, or running in its process.

    Attributes:
        need_bytes: Predicted memory.
        ending: How it ended, once it has said so.
        is_stopping: Whether it was asked to save and end.
        was_told: Whether its owner knows that it waits.
    """

    files: JobFiles
    need_bytes: int
    process: ChildProcess | None = None
    ending: dict[str, Any] = field(default_factory=dict)
    is_stopping: bool = False
    was_told: bool = False

    @classmethod
    def prepare(cls, files: JobFiles) -> ChildJob:
        """Refuse what cannot work, and predict the memory of what can. In any thread.

        Raises:
            RecipeError: when method and base do not go together.
        """
        recipe = files.recipe
        placement = placement_of(recipe)
        check_optimizer(recipe, placement.device)
        check_exclusive_method(recipe, placement.folder)
        return cls(files, admission_bytes(recipe, placement))

    @property
    def id(self) -> str:
        return self.files.claimed.claim.job

    @property
    def claim(self) -> Claim:
        return self.files.claimed.claim


class ChildJobs:
    """The exclusive jobs of one worker. For the thread that runs the base.

    Args:
        base_folder: Where the base's weights and tokenizer lie.
        score_tokens, threads: As the child takes them.
        free_bytes: How much memory is free now.
        is_alone: Whether nothing else trains here: then the first that waits starts, and measures for itself.
        on_gpu: Whether the memory is a GPU's.
    """

    def __init__(
        self,
        record: JobRecord,
        base_folder: Path,
        score_tokens: int,
        threads: int | None,
        *,
        free_bytes: Callable[[], int],
        is_alone: Callable[[], bool],
        on_gpu: bool = False,
    ) -> None:
        self._record = record
        self._base_folder = base_folder
        self._score_tokens = score_tokens
        self._threads = threads
        self._free_bytes = free_bytes
        self._is_alone = is_alone
        self._on_gpu = on_gpu
        self._waiting: deque[ChildJob] = deque()
        self._running: dict[str, ChildJob] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def bytes_to_come(self) -> int:
        """What the running ones are predicted to take beyond what they hold now."""
        return sum(job.process.bytes_to_come for job in self._running.values() if job.process is not None)

    def add(self, job: ChildJob) -> None:
        """Take a prepared job in; it starts as soon as there is memory for it."""
        self._waiting.append(job)

    def poll(self) -> None:
        """Record what the children have said, take in those that have ended, and start those that may."""
        for job in list(self._running.values()):
            assert job.process is not None
            has_ended = job.process.has_ended  # asked first, so that nothing said before the end is missed
            for message in job.process.messages():
                self._take(job, message)
            if has_ended:
                self._forget(job)
                self._record_end(job)
        self._start_waiting()

    def obey(self, job: str, wish: Wish) -> None:
        """Do what is asked of a job: save it and let go, or drop it."""
        found = self._find(job)
        if found is None:
            return
        if wish == "pause" and found.process is not None:
            found.is_stopping = True
            found.process.stop()
            return
        self.drop(job)
        if wish != "lost":
            self._record.release(found.claim)

    def drop(self, job: str) -> None:
        """End a job's process without a word to the record."""
        found = self._find(job)
        if found is None:
            return
        if found.process is not None:
            found.process.process.kill()
            found.process.process.wait()
        self._forget(found)

    def stop_all(self, seconds: float) -> None:
        """Let every job be saved and let go; those that have not saved in time are killed and go on elsewhere."""
        for waiting in list(self._waiting):
            self.obey(waiting.id, "pause")
        for running in list(self._running):
            self.obey(running, "pause")
        deadline = time.monotonic() + seconds
        while self._running:
            self.poll()
            if time.monotonic() > deadline:
                for running in list(self._running):
                    self.drop(running)
            time.sleep(POLL_SECONDS)

    def _find(self, job: str) -> ChildJob | None:
        return self._running.get(job) or next((waiting for waiting in self._waiting if waiting.id == job), None)

    def _start_waiting(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            is_alone = self._is_alone() and not self._running
            free = self._free_bytes() - self.bytes_to_come
            if not is_alone and job.need_bytes > free:
                if not job.was_told:
                    job.was_told = True
                    self._record.wait_for_memory(job.claim, job.need_bytes, free)
                return
            self._waiting.popleft()
            order = Order(job.files, self._base_folder, self._score_tokens, self._threads)
            job.process = ChildProcess.spawn(MODULE, order.to_dict(), job.need_bytes, on_gpu=self._on_gpu)
            self._running[job.id] = job

    def _take(self, job: ChildJob, message: dict[str, Any]) -> None:
        match message["verb"]:
            case "begin":
                self._record.begin(job.claim, message["total_steps"], message["num_rows"], message["num_tokens"])
            case "step":
                assert job.process is not None
                job.process.has_stepped = True
                self._record.step(job.claim, StepRecord(**message["step"]))
            case "checkpoint":
                files, checkpoint = SavedFiles.from_dict(message["files"]), CheckpointRecord(**message["checkpoint"])
                self._record.checkpoint(job.claim, files, checkpoint)
            case _:
                job.ending = message

    def _forget(self, job: ChildJob) -> None:
        if job.process is None:
            self._waiting.remove(job)
        else:
            del self._running[job.id]
            job.process.close()
        shutil.rmtree(job.files.folder, ignore_errors=True)

    def _record_end(self, job: ChildJob) -> None:
        ending, claim = job.ending, job.claim
        match ending.get("verb"):
            case "result":
                self._record.finish(claim, SavedFiles.from_dict(ending["files"]), JobResult(**ending["result"]))
            case "failed":
                self._record.fail(claim, "training_failed", public(ending["message"], job.files.folder))
            case "error":
                self._record.refuse(claim, job.files.folder, error_of(ending))
            case _ if job.is_stopping:  # saved, or ended before it could say so
                self._record.release(claim)
            case _:
                assert job.process is not None
                logger.warning("a child died", extra={"job": job.id, "problem": job.process.problem()})
                self._record.release(claim, is_loss=True)
