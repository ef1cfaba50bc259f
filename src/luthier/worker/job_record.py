"""What a worker tells the record about its jobs, wherever they run: every verb waits its turn in the recorder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from luthier.errors import DataError, LuthierError
from luthier.registry.seam import CheckpointRecord, Claim, JobResult, StepRecord, Wish, WorkRecord
from luthier.store.blobs import Blobs
from luthier.worker.progress import gib
from luthier.worker.recorded_run import SavedFiles, public
from luthier.worker.recorder import Recorder

logger = logging.getLogger("luthier.worker")


class JobRecord:
    """The verbs of `WorkRecord` about jobs, recorded in order and later. Files are stored before they are named.

    Args:
        on_wish: Told what is asked of a job, as its steps are recorded.
    """

    def __init__(
        self, record: WorkRecord, blobs: Blobs, recorder: Recorder, on_wish: Callable[[str, Wish], None]
    ) -> None:
        self._record = record
        self._blobs = blobs
        self._recorder = recorder
        self._on_wish = on_wish

    def begin(self, claim: Claim, total_steps: int, num_rows: int, num_tokens: int) -> None:
        self._recorder.put(claim.job, lambda: self._record.begin(claim, total_steps, num_rows, num_tokens))

    def step(self, claim: Claim, step: StepRecord) -> None:
        def record() -> None:
            wish = self._record.record_steps(claim, [step])
            if wish is not None:
                self._on_wish(claim.job, wish)

        self._recorder.put(claim.job, record)

    def checkpoint(self, claim: Claim, files: SavedFiles, checkpoint: CheckpointRecord) -> None:
        def record() -> None:
            sha256, num_bytes = files.put(self._blobs)
            done = replace(checkpoint, sha256=sha256, num_bytes=num_bytes)
            for prefix in self._record.register_checkpoint(claim, done):
                self._blobs.delete(prefix)

        self._recorder.put(claim.job, record)

    def wait_for_memory(self, claim: Claim, need_bytes: int, free_bytes: int) -> None:
        """Tell the owner, once, that a job that is held here waits until others are done."""
        need, free = gib(need_bytes), gib(max(0, free_bytes))
        message = f"The job waits for memory: it needs {need} for a base of its own, and {free} are free beside others"
        self._recorder.put(claim.job, lambda: self._record.record_event(claim, "memory:own", message, "warn"))

    def decline(self, claim: Claim, need_bytes: int, free_bytes: int) -> None:
        self._recorder.put(claim.job, lambda: self._record.decline(claim, need_bytes, free_bytes))

    def finish(self, claim: Claim, files: SavedFiles, result: JobResult) -> None:
        def record() -> None:
            sha256, num_bytes = files.put(self._blobs)
            self._record.finish(claim, replace(result, sha256=sha256, num_bytes=num_bytes))

        self._recorder.put(claim.job, record)

    def fail(self, claim: Claim, code: str, message: str) -> None:
        self._recorder.put(claim.job, lambda: self._record.fail(claim, code, message))

    def release(self, claim: Claim, *, is_loss: bool = False) -> None:
        self._recorder.put(claim.job, lambda: self._record.release(claim, is_loss=is_loss))

    def refuse(self, claim: Claim, folder: Path, error: Exception) -> None:
        """The job cannot begin: say why, without places of this machine, and forget its files.

        Args:
            folder: Where the job's files lie here.
        """
        if isinstance(error, LuthierError):
            code = "invalid_training_file" if isinstance(error, DataError) else "invalid_job"
            message = public(error.found, folder)
        else:
            logger.error("a job could not be prepared", extra={"job": claim.job}, exc_info=error)
            code, message = "internal_error", "The job could not be prepared, for a reason that is in the worker's log."
        shutil.rmtree(folder, ignore_errors=True)
        self.fail(claim, code, message)
