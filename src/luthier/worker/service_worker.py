"""The service's worker: one process, one base, jobs of all tenants trained together, and replies of their adapters.

One thread runs the base. It takes turns: a forward and backward for the jobs, then forwards for the replies, for as
long as their share of the time allows. What it must not wait for is elsewhere: the heartbeat and claims, fetching and
rendering of jobs' data, recording, and the HTTP endpoint have threads of their own, and hand things over through
`_inbox`.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.base.load import Base
from luthier.data.template import Renderer
from luthier.engine.engine import Engine, is_out_of_memory
from luthier.engine.job import StepReport
from luthier.engine.memory import plan_memory
from luthier.errors import DataError, LuthierError
from luthier.recipe import Recipe
from luthier.registry.seam import ClaimedJob, SampleEvent, SampleRequest, WorkerCard, WorkRecord
from luthier.store.blobs import Blobs
from luthier.worker.adapters import AdapterFolders, ServedSlots
from luthier.worker.endpoint import Endpoint
from luthier.worker.loading import load_placed, placement_of
from luthier.worker.predict import predict
from luthier.worker.recorded_run import RecordedRun
from luthier.worker.recorder import Recorder
from luthier.worker.replies import Replies, Task, TaskMaker
from luthier.worker.train import device_name, peak_memory_bytes

logger = logging.getLogger("luthier.worker")

REPLY_SECONDS_PER_TRAINING_SECOND = 0.6
"""While jobs train, replies get this much time for each second of training: training keeps 62%."""
CLAIM_SECONDS = 0.5
SHUTDOWN_SECONDS = 60.0


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker works.

    Attributes:
        base, source: The base's name in jobs, and what it stands for.
        scratch: A folder of this process's own, which can be lost.
        step_tokens: Most tokens in one training forward.
        max_jobs: Most jobs that train together.
        max_slots: Most adapters that serve from memory.
        lease_seconds: How long the worker may be silent before its jobs go to others.
        idle_seconds: End after this long without a job or request; None never does.
        host, port, address: Where the endpoint listens, and the address that others reach it by.
        threads: CPU threads; None takes all cores.
    """

    base: str
    source: str
    scratch: Path
    step_tokens: int = 256
    max_jobs: int = 16
    max_slots: int = 64
    lease_seconds: float = 15.0
    idle_seconds: float | None = None
    host: str = "127.0.0.1"
    port: int = 0
    address: str | None = None
    threads: int | None = None


class ServiceWorker:
    """A worker. `run` returns when it was told to stop, or when it was idle for long."""

    def __init__(self, record: WorkRecord, blobs: Blobs, options: WorkerOptions) -> None:
        self._record = record
        self._blobs = blobs
        self._options = options
        self._id = f"worker_{secrets.token_hex(12)}"
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        self._runs: dict[str, RecordedRun] = {}
        self._preparing: set[str] = set()
        self._is_stopping = threading.Event()
        self._max_jobs = options.max_jobs
        self._in_between = False
        shutil.rmtree(options.scratch, ignore_errors=True)
        options.scratch.mkdir(parents=True)

    # -- life

    def run(self) -> None:
        """Load the base, and work until told to stop."""
        options = self._options
        placement = placement_of(Recipe.model_validate({"base": options.source, "data": {"train": "-"}}))
        self._base_folder = placement.folder
        self.base: Base = load_placed(placement, options.threads)
        self.renderer = Renderer.load(placement.folder)
        self._engine = Engine(self.base, options.step_tokens, lead_tokens=2.0 * options.step_tokens)
        self._slots = ServedSlots(self.base, options.max_slots)
        self._replies = Replies(self.base, self.renderer, self._slots, options.step_tokens)
        self._folders = AdapterFolders(self._blobs, options.scratch / "adapters")
        self._maker = TaskMaker(self.renderer, self._folders, self.base.vocabulary_size)
        self._recorder = Recorder(
            lambda job: self._inbox.put(lambda: self._drop(job)),
            lambda job, error: self._inbox.put(lambda: self._give_up(job, error)),
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prepare")
        secret = secrets.token_hex(24)
        endpoint = Endpoint(self, secret, options.host, options.port)
        address = options.address or f"http://{options.host}:{endpoint.port}"
        self._card = WorkerCard(self._id, options.base, address, secret)
        self._record.register(self._card, options.lease_seconds)
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        logger.info("worker ready", extra={"worker": self._id, "base": options.base})
        try:
            while not self._is_stopping.is_set() and not self._is_idle():
                self._turn()
        finally:
            self._is_stopping.set()
            self._wind_up(endpoint)

    def stop(self) -> None:
        """Ask the worker to save its jobs and end. From any thread, or a signal handler."""
        self._is_stopping.set()

    def _wind_up(self, endpoint: Endpoint) -> None:
        """Let everything go: jobs are saved where they stand, replies told, the lease given back."""
        self._replies.end_all("the worker is shutting down; send the request again")
        endpoint.close()
        for run in list(self._runs.values()):
            self._pause(run)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._recorder.close(SHUTDOWN_SECONDS)
        self._record.leave(self._id)
        shutil.rmtree(self._options.scratch, ignore_errors=True)

    def _is_idle(self) -> bool:
        limit = self._options.idle_seconds
        is_busy = self._runs or self._preparing or self._replies.has_work or not self._inbox.empty()
        return limit is not None and not is_busy and time.monotonic() - self._replies.last_used_at > limit

    # -- heartbeat and claims, in a thread of their own

    def _beat(self) -> None:
        options = self._options
        next_beat = 0.0
        while not self._is_stopping.wait(CLAIM_SECONDS):
            try:
                if time.monotonic() >= next_beat:
                    for job, wish in self._record.heartbeat(self._id, options.lease_seconds).items():
                        self._inbox.put(lambda job=job, wish=wish: self._obey(job, wish))  # type: ignore[misc]
                    next_beat = time.monotonic() + options.lease_seconds / 4
                room = self._max_jobs - len(self._runs) - len(self._preparing)
                for claimed in self._record.claim(self._id, min(room, 4), options.lease_seconds):
                    self._preparing.add(claimed.claim.job)
                    self._pool.submit(self._prepare, claimed)
            except Exception:
                logger.exception("the store does not answer the heartbeat; trying again")

    # -- jobs come

    def _prepare(self, claimed: ClaimedJob) -> None:
        """In the preparing thread: files, data, checkpoint."""
        try:
            run = RecordedRun.prepare(
                claimed, self._blobs, self._options.scratch, self._options.source, self._base_folder
            )
        except Exception as problem:
            error = problem
            self._inbox.put(lambda: self._refuse(claimed, error))
            return
        self._inbox.put(lambda: self._admit(run))

    def _refuse(self, claimed: ClaimedJob, error: Exception) -> None:
        job = claimed.claim.job
        self._preparing.discard(job)
        folder = self._options.scratch / "jobs" / job
        if isinstance(error, LuthierError):
            code = "invalid_training_file" if isinstance(error, DataError) else "invalid_job"
            message = error.found.replace(f"{folder}/run", "the job").replace(f"{folder}/", "")
        else:
            logger.error("a job could not be prepared", extra={"job": job}, exc_info=error)
            code, message = "internal_error", "The job could not be prepared, for a reason that is in the worker's log."
        shutil.rmtree(folder, ignore_errors=True)
        self._recorder.put(job, lambda: self._record.fail(claimed.claim, code, message))

    def _admit(self, run: RecordedRun) -> None:
        """Give a prepared job its slot, if memory allows."""
        self._preparing.discard(run.id)
        claim, slots_before = run.claimed.claim, set(self.base.bank.slots)
        try:
            run.admit(self.base, self._options.step_tokens, self._breathe)
            if not self._fits(run):
                self._turn_away(run)
                return
            run.run.plan_judging()
            total, rows, tokens = run.job.total_steps, run.num_rows, run.num_tokens
            self._recorder.put(run.id, lambda: self._record.begin(claim, total, rows, tokens))
            run.run.judge_base()
        except Exception as error:  # whatever is wrong with one job, the others go on
            for index in set(self.base.bank.slots) - slots_before - self._slots.indices:
                self.base.bank.remove(self.base.bank.slots[index])
            self._refuse(run.claimed, error)
            return
        self._runs[run.id] = run
        self._engine.add(run.job, run.claimed.tenant, run.claimed.weight)

    def _fits(self, run: RecordedRun) -> bool:
        """Whether there is memory for one more job. What others have taken is measured as taken; those that have not
        stepped yet have still to take their gradients and moments."""
        plan = plan_memory(self.base, [run.job], self._options.step_tokens)
        own = sum(parameter.numel() for parameter in run.slot.parameters().values())
        share = (plan.gradients + plan.optimizer) / max(1, own)
        waiting = sum(
            parameter.numel()
            for job in self._engine.jobs.values()
            if job.step == 0
            for parameter in job.slot.parameters().values()
        )
        return plan.needed + int(share * waiting) <= plan.available

    def _turn_away(self, run: RecordedRun) -> None:
        """There is no memory for this job now: others finish first, or it never fits."""
        self.base.bank.remove(run.slot)
        claim = run.claimed.claim
        run.drop()
        if self._runs:
            self._max_jobs = len(self._runs)
            self._recorder.put(run.id, lambda: self._record.release(claim))
        else:
            message = "The job does not fit into the worker's memory; lower method.rank or train.max_length."
            self._recorder.put(run.id, lambda: self._record.fail(claim, "out_of_memory", message))

    # -- one turn of the loop

    def _turn(self) -> None:
        self._take_inbox()
        spent = self._train() if self._engine.has_work and not self._recorder.is_behind else 0.0
        self._finish_ended()
        deadline = time.monotonic() + spent * REPLY_SECONDS_PER_TRAINING_SECOND
        while self._replies.has_work:
            self._replies.step()
            self._take_inbox()
            if self._engine.has_work and time.monotonic() >= deadline:
                break
        if not spent and not self._replies.has_work:
            self._wait()

    def _wait(self) -> None:
        try:
            self._inbox.get(timeout=0.05)()
        except queue.Empty:
            return

    def _take_inbox(self) -> None:
        while True:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                return
            work()

    def _breathe(self) -> None:
        """Between the forwards of an evaluation: let replies go on. Jobs wait, so only replies are taken in."""
        if self._in_between:
            return
        self._in_between = True
        try:
            self._take_tasks()
            self._replies.step()
        finally:
            self._in_between = False

    def _take_tasks(self) -> None:
        """Take requests out of the inbox, and leave the rest in its order."""
        others: list[Callable[[], None]] = []
        while True:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(work, _Begin):
                work()
            else:
                others.append(work)
        for work in others:
            self._inbox.put(work)

    def _train(self) -> float:
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
        step = run.on_step(report)
        claim, job = run.claimed.claim, run.id

        def record() -> None:
            wish = self._record.record_steps(claim, [step])
            if wish is not None:
                self._inbox.put(lambda: self._obey(job, wish))

        self._recorder.put(job, record)
        self._store_checkpoint(run)

    def _store_checkpoint(self, run: RecordedRun) -> None:
        """Hand the newest checkpoint over to those who chat, and copy its files into the store."""
        taken = run.take_checkpoint()
        if taken is None:
            return
        files, checkpoint = taken
        claim = run.claimed.claim
        self._slots.adopt(checkpoint.prefix, run.slot)

        def record() -> None:
            sha256, num_bytes = files.put(self._blobs)
            done = replace(checkpoint, sha256=sha256, num_bytes=num_bytes)
            for prefix in self._record.register_checkpoint(claim, done):
                self._blobs.delete(prefix)

        self._recorder.put(run.id, record)

    # -- jobs go

    def _finish_ended(self) -> None:
        for run in list(self._runs.values()):
            if run.run.name in self._engine.jobs and not run.job.is_active:
                self._finish(run)

    def _finish(self, run: RecordedRun) -> None:
        claim = run.claimed.claim
        self._engine.remove(run.run.name)
        if run.job.state == "failed":
            problem = run.public(run.job.problem)
            self._recorder.put(run.id, lambda: self._record.fail(claim, "training_failed", problem))
            self._forget(run)
            return
        files, result = run.take_result(peak_memory_bytes(self.base.device), device_name(self.base))
        self._slots.adopt(result.prefix, run.slot)

        def record() -> None:
            sha256, num_bytes = files.put(self._blobs)
            self._record.finish(claim, replace(result, sha256=sha256, num_bytes=num_bytes))

        self._recorder.put(run.id, record)
        self._forget(run)

    def _obey(self, job: str, wish: str) -> None:
        run = self._runs.get(job)
        if run is None:
            return
        if wish == "pause":
            self._pause(run)
        else:
            claim = run.claimed.claim
            self._drop(job)
            if wish == "cancel":
                self._recorder.put(job, lambda: self._record.release(claim))

    def _pause(self, run: RecordedRun) -> None:
        claim = run.claimed.claim
        run.save()
        self._store_checkpoint(run)
        self._recorder.put(run.id, lambda: self._record.release(claim))
        self._drop(run.id)

    def _drop(self, job: str) -> None:
        """Forget a job without a word to the record."""
        run = self._runs.get(job)
        if run is not None:
            if run.run.name in self._engine.jobs:
                self._engine.remove(run.run.name)
            self._forget(run)

    def _forget(self, run: RecordedRun) -> None:
        del self._runs[run.id]
        self.base.bank.remove(run.slot)
        run.drop()
        self._max_jobs = self._options.max_jobs
        self._replies.last_used_at = time.monotonic()

    def _give_up(self, job: str, error: Exception) -> None:
        """A record failed for a reason of its own: the job ends here and goes on elsewhere when the lease runs out."""
        logger.error("the job is let go", extra={"job": job}, exc_info=error)
        self._drop(job)

    def _fail_largest(self) -> None:
        """Memory ran out with a single sequence of a single job: end the job with the largest one."""
        name = max(self._engine.jobs, key=lambda name: self._engine.jobs[name].micro_batch_tokens)
        self._engine.jobs[name].fail("one sequence alone does not fit into the worker's memory; lower train.max_length")

    # -- what the endpoint asks, from its threads

    @property
    def num_open(self) -> int:
        return self._replies.num_open

    def make(self, request: SampleRequest, emit: Callable[[SampleEvent], None]) -> Task:
        return self._maker.make(request, emit)

    def submit(self, task: Task) -> None:
        self._inbox.put(_Begin(self._replies, task))

    def predict(self, adapter: str, texts: list[str]) -> dict[str, Any]:
        folder, own = self._folders.fetch(adapter)
        done: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()

        def work() -> None:
            try:
                slot = self._slots.borrow(adapter, folder)
                try:
                    done.set_result(predict(self.base, slot, own or self.renderer, folder, texts))
                finally:
                    self._slots.give_back(adapter)
            except Exception as error:
                done.set_exception(error)

        self._inbox.put(work)
        return done.result(timeout=600)


@dataclass(frozen=True)
class _Begin:
    """A request on its way into the loop; told apart from other work, for evaluations let requests in."""

    replies: Replies
    task: Task

    def __call__(self) -> None:
        self.replies.begin(self.task)


def run_worker(record: WorkRecord, blobs: Blobs, options: WorkerOptions) -> None:
    """Run a worker in this process until SIGTERM or SIGINT, which save its jobs first."""
    worker = ServiceWorker(record, blobs, options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
