"""Jobs that train together on the worker's resident base: they come, step, save, pause, and go."""

from __future__ import annotations

import time
from collections.abc import Callable

from luthier.base.load import Base
from luthier.engine.engine import Engine, is_out_of_memory
from luthier.engine.job import StepReport
from luthier.engine.memory import plan_memory
from luthier.registry.seam import Wish
from luthier.worker.adapters import ServedSlots
from luthier.worker.job_record import JobRecord
from luthier.worker.recorded_run import RecordedRun
from luthier.worker.train import device_name, peak_memory_bytes
from luthier.worker.worker_options import WorkerOptions


class ResidentJobs:
    """The jobs in the bank. For the thread that runs the base.

    Args:
        slots: Take a snapshot of each checkpoint, so that it answers at once.
        breathe: Called between the forwards of an evaluation.
        reserved_bytes: What others on this machine are about to take of the memory that is free now.
    """

    def __init__(
        self,
        base: Base,
        options: WorkerOptions,
        record: JobRecord,
        slots: ServedSlots,
        breathe: Callable[[], None],
        reserved_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._base = base
        self._options = options
        self._record = record
        self._slots = slots
        self._breathe = breathe
        self._reserved_bytes = reserved_bytes
        self._engine = Engine(base, options.step_tokens, lead_tokens=2.0 * options.step_tokens)
        self._runs: dict[str, RecordedRun] = {}
        self._max = options.max_jobs
        self.last_left_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, job: str) -> bool:
        return job in self._runs

    @property
    def room(self) -> int:
        """How many more jobs may come."""
        return self._max - len(self._runs)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    # -- jobs come

    def admit(self, run: RecordedRun) -> None:
        """Give a prepared job its slot, if memory allows."""
        claim, slots_before = run.claimed.claim, set(self._base.bank.slots)
        try:
            run.admit(self._base, self._options.step_tokens, self._breathe)
            need, free = self._need_and_free(run)
            if need > free:
                self._turn_away(run, need, free)
                return
            run.run.plan_judging()
            self._record.begin(claim, run.job.total_steps, run.num_rows, run.num_tokens)
            run.run.judge_base()
        except Exception as error:  # whatever is wrong with one job, the others go on
            for index in set(self._base.bank.slots) - slots_before - self._slots.indices:
                self._base.bank.remove(self._base.bank.slots[index])
            self._record.refuse(claim, run.folder, error)
            return
        self._runs[run.id] = run
        self._engine.add(run.job, run.claimed.tenant, run.claimed.weight)

    def _need_and_free(self, run: RecordedRun) -> tuple[int, int]:
        """Bytes that one more job takes beyond the base, and those that are free for it.

        What others have taken is measured as taken; those that have not stepped yet have still to take their gradients
        and moments. The job's own adapter is there already.
        """
        plan = plan_memory(self._base, [run.job], self._options.step_tokens)
        own = sum(parameter.numel() for parameter in run.slot.parameters().values())
        share = (plan.gradients + plan.optimizer) / max(1, own)
        waiting = sum(
            parameter.numel()
            for job in self._engine.jobs.values()
            if job.step == 0
            for parameter in job.slot.parameters().values()
        )
        free = plan.available + plan.adapters - int(share * waiting) - self._reserved_bytes()
        return plan.needed + plan.adapters, free

    def _turn_away(self, run: RecordedRun, need_bytes: int, free_bytes: int) -> None:
        """There is no memory for this job now: others finish first, or another worker has it, or it never fits."""
        self._base.bank.remove(run.slot)
        claim = run.claimed.claim
        run.drop()
        if self._runs:
            self._max = len(self._runs)
        self._record.decline(claim, need_bytes, max(0, free_bytes))

    # -- jobs step

    def train(self) -> float:
        """One forward and backward; returns the seconds that it took."""
        started = time.monotonic()
        try:
            reports = self._engine.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._fail_largest()
            return time.monotonic() - started
        by_name = {run.run.name: run for run in self._runs.values()}
        for report in reports:
            self._on_step(by_name[report.job], report)
        return time.monotonic() - started

    def _on_step(self, run: RecordedRun, report: StepReport) -> None:
        self._record.step(run.claimed.claim, run.on_step(report))
        self._store_checkpoint(run)

    def _store_checkpoint(self, run: RecordedRun) -> None:
        """Hand the newest checkpoint over to those who chat, and copy its files into the store."""
        taken = run.take_checkpoint()
        if taken is None:
            return
        files, checkpoint = taken
        self._slots.adopt(checkpoint.prefix, run.slot)
        self._record.checkpoint(run.claimed.claim, files, checkpoint)

    def _fail_largest(self) -> None:
        """Memory ran out with a single sequence of a single job: end the job with the largest one."""
        name = max(self._engine.jobs, key=lambda name: self._engine.jobs[name].micro_batch_tokens)
        self._engine.jobs[name].fail("one sequence alone does not fit into the worker's memory; lower train.max_length")

    # -- jobs go

    def finish_ended(self) -> None:
        """Take the results of jobs that have done their last step, or failed."""
        for run in list(self._runs.values()):
            if run.run.name in self._engine.jobs and not run.job.is_active:
                self._finish(run)

    def _finish(self, run: RecordedRun) -> None:
        claim = run.claimed.claim
        self._engine.remove(run.run.name)
        if run.job.state == "failed":
            self._record.fail(claim, "training_failed", run.public(run.job.problem))
            self._forget(run)
            return
        files, result = run.take_result(peak_memory_bytes(self._base.device), device_name(self._base))
        self._slots.adopt(result.prefix, run.slot)
        self._record.finish(claim, files, result)
        self._forget(run)

    def obey(self, job: str, wish: Wish) -> None:
        """Do what is asked of a job: save it and let go, or drop it."""
        run = self._runs.get(job)
        if run is None:
            return
        if wish == "pause":
            self._pause(run)
        else:
            self.drop(job)
            if wish == "cancel":
                self._record.release(run.claimed.claim)

    def pause_all(self) -> None:
        """Save every job where it stands and let it go."""
        for run in list(self._runs.values()):
            self._pause(run)

    def drop(self, job: str) -> None:
        """Forget a job without a word to the record."""
        run = self._runs.get(job)
        if run is not None:
            if run.run.name in self._engine.jobs:
                self._engine.remove(run.run.name)
            self._forget(run)

    def _pause(self, run: RecordedRun) -> None:
        run.save()
        self._store_checkpoint(run)
        self._record.release(run.claimed.claim)
        self.drop(run.id)

    def _forget(self, run: RecordedRun) -> None:
        del self._runs[run.id]
        self._base.bank.remove(run.slot)
        run.drop()
        self._max = self._options.max_jobs
        self.last_left_at = time.monotonic()
