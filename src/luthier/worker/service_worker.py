"""The service's worker: one process, one base, jobs of all tenants trained together, and replies of their adapters.

One thread runs the base. It takes turns: a forward and backward for the jobs (`resident_jobs.py`), then forwards for
the replies (`replies.py`), for as long as their share of the time allows. What it must not wait for is elsewhere: the
heartbeat and claims, fetching and rendering of data, recording, and the HTTP endpoint have threads of their own, and
hand things over through the inbox.
"""

from __future__ import annotations

import concurrent.futures
import logging
import secrets
import shutil
import signal
import threading
import time

from luthier.engine.memory import available_bytes, available_to_others
from luthier.registry.seam import ClaimedJob, Wish, WorkerCard, WorkRecord
from luthier.store.blobs import Blobs
from luthier.worker.adapters import AdapterFolders, ServedSlots, tenant_of
from luthier.worker.child_jobs import ChildJob, ChildJobs
from luthier.worker.endpoint import Endpoint
from luthier.worker.heartbeat import Heartbeat
from luthier.worker.inbox import Inbox
from luthier.worker.job_record import JobRecord
from luthier.worker.recorded_run import JobFiles, RecordedRun
from luthier.worker.recorder import Recorder
from luthier.worker.replies import Replies
from luthier.worker.reply_desk import Answering, ReplyDesk
from luthier.worker.resident import load_resident
from luthier.worker.resident_jobs import ResidentJobs
from luthier.worker.room import check_room, most_for_jobs, room_for
from luthier.worker.worker_options import WorkerOptions

__all__ = ["ServiceWorker", "WorkerOptions", "run_worker"]

logger = logging.getLogger("luthier.worker")

REPLY_SECONDS_PER_TRAINING_SECOND = 0.45
"""While jobs train, replies get this much time for each second of training: training keeps 69% of a worker's time. The
API and its clients take their part of the processor besides."""
WAIT_SECONDS = 0.05
SHUTDOWN_SECONDS = 60.0


class ServiceWorker:
    """A worker. `run` returns when it was told to stop, or when it was idle for long."""

    def __init__(self, record: WorkRecord, blobs: Blobs, options: WorkerOptions) -> None:
        self._record = record
        self._blobs = blobs
        self._options = options
        self._id = f"worker_{secrets.token_hex(12)}"
        self._inbox = Inbox()
        self._preparing: set[str] = set()
        self._is_stopping = threading.Event()
        self._is_over = threading.Event()
        self._reply_seconds = 0.0
        self._in_between = False
        shutil.rmtree(options.scratch, ignore_errors=True)
        options.scratch.mkdir(parents=True)

    # -- life

    def run(self) -> None:
        """Load the base, and work until told to stop.

        Raises:
            MemoryShortError: where there is too little memory for the base.
        """
        options = self._options
        room = room_for(options)
        if options.place is not None:
            self._record.note_room(options.place, options.held_base, room, options.need_bytes)
        check_room(room, options)
        self._load()
        secret = secrets.token_hex(24)
        endpoint = Endpoint(self._desk, secret, options.host, options.port)
        address = options.address or f"http://{options.host}:{endpoint.port}"
        free = self._free_bytes()
        card = WorkerCard(self._id, options.held_base, address, secret, options.place, free, most_for_jobs(room, free))
        self._record.register(card, options.lease_seconds)
        Heartbeat(
            self._record,
            self._id,
            options.lease_seconds,
            room=self._room,
            free_bytes=self._free_bytes,
            on_wish=self._on_wish,
            on_claimed=self._on_claimed,
            tenants=self._tenants,
            on_erased=self._on_erased,
            is_over=self._is_over,
        ).start()
        logger.info("worker ready", extra={"worker": self._id, "base": str(options.held_base)})
        try:
            while not self._is_stopping.is_set() and not self._is_idle():
                self._turn()
        finally:
            self._is_stopping.set()
            self._wind_up(endpoint)

    def stop(self) -> None:
        """Ask the worker to save its jobs and end. From any thread, or a signal handler."""
        self._is_stopping.set()

    def _load(self) -> None:
        """Load the base and put the parts together."""
        options = self._options
        self._resident = resident = load_resident(options, self._blobs)
        base = resident.base
        self._slots = ServedSlots(base, options.max_slots)
        self._replies = Replies(base, resident.renderer, self._slots, options.step_tokens, resident.home)
        self._folders = AdapterFolders(self._blobs, options.scratch / "adapters")
        self._desk = ReplyDesk(resident, self._replies, self._slots, self._folders, self._inbox, options.step_tokens)
        self._recorder = Recorder(
            lambda job: self._inbox.put(lambda: self._drop(job)),
            lambda job, error: self._inbox.put(lambda: self._give_up(job, error)),
        )
        self._told = JobRecord(self._record, self._blobs, self._recorder, self._on_wish)
        self._children = ChildJobs(
            self._told,
            resident.folder,
            options.step_tokens,
            options.threads,
            free_bytes=lambda: available_to_others(base.device),
            is_alone=lambda: not len(self._jobs),
            on_gpu=base.device.type == "cuda",
        )
        self._jobs = ResidentJobs(
            base, options, self._told, self._slots, self._breathe, lambda: self._children.bytes_to_come
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def _wind_up(self, endpoint: Endpoint) -> None:
        """Let everything go: jobs are saved where they stand, replies told, the lease given back."""
        self._replies.end_all("the worker is shutting down; send the request again")
        endpoint.close()
        self._jobs.pause_all()
        self._children.stop_all(SHUTDOWN_SECONDS)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._recorder.close(SHUTDOWN_SECONDS)
        self._is_over.set()  # until now the heartbeat has held the leases of what was being saved
        self._record.leave(self._id)
        shutil.rmtree(self._options.scratch, ignore_errors=True)

    def _is_idle(self) -> bool:
        limit = self._options.idle_seconds
        is_busy = (
            len(self._jobs)
            or len(self._children)
            or self._preparing
            or self._replies.has_work
            or not self._inbox.is_empty
        )
        last_used_at = max(self._replies.last_used_at, self._jobs.last_left_at)
        return limit is not None and not is_busy and time.monotonic() - last_used_at > limit

    # -- one turn of the loop

    def _turn(self) -> None:
        self._inbox.take_all()
        spent = self._jobs.train() if self._jobs.has_work and not self._recorder.is_behind else 0.0
        self._jobs.finish_ended()
        self._children.poll()
        # Time that replies took beyond theirs is taken off the next; time that they left is not kept.
        owed = min(self._reply_seconds, 0.0) if spent else 0.0
        self._reply_seconds = owed + spent * REPLY_SECONDS_PER_TRAINING_SECOND
        while self._replies.has_work and (self._reply_seconds > 0.0 or not spent):
            started = time.monotonic()
            self._replies.step()
            self._inbox.take_all()
            self._reply_seconds -= time.monotonic() - started
            if self._jobs.has_work and not spent:
                break
        if not spent and not self._replies.has_work:
            self._inbox.wait(WAIT_SECONDS)

    def _breathe(self) -> None:
        """Between the forwards of an evaluation: let answers go on. Jobs wait, so only answers are taken in."""
        if self._in_between:
            return
        self._in_between = True
        try:
            self._inbox.take_only(Answering)
            self._replies.step()
        finally:
            self._in_between = False

    # -- jobs come, from the heartbeat's thread and the preparing one

    def _room(self) -> int:
        """How many more jobs may come: none to one that is ending."""
        if self._is_stopping.is_set():
            return 0
        return self._jobs.room - len(self._children) - len(self._preparing)

    def _free_bytes(self) -> int:
        """What a job that came now could take. In any thread."""
        return max(0, available_bytes(self._resident.base.device) - self._children.bytes_to_come)

    def _on_claimed(self, claimed: ClaimedJob) -> None:
        self._preparing.add(claimed.claim.job)
        self._pool.submit(self._prepare, claimed)

    def _prepare(self, claimed: ClaimedJob) -> None:
        """In the preparing thread: files, data, checkpoint. The process of an exclusive job sees to its data itself."""
        try:
            files = JobFiles.fetch(claimed, self._blobs, self._options.scratch, self._resident.source)
            job: RecordedRun | ChildJob
            if files.recipe.method.runs == "exclusive":
                job = ChildJob.prepare(files)
            else:
                job = RecordedRun.begin(files, self._resident.folder)
        except Exception as problem:
            error = problem
            self._inbox.put(lambda: self._refuse(claimed, error))
            return
        self._inbox.put(lambda: self._admit(job))

    def _refuse(self, claimed: ClaimedJob, error: Exception) -> None:
        self._preparing.discard(claimed.claim.job)
        self._told.refuse(claimed.claim, self._options.scratch / "jobs" / claimed.claim.job, error)

    def _admit(self, job: RecordedRun | ChildJob) -> None:
        self._preparing.discard(job.id)
        if isinstance(job, ChildJob):
            self._children.add(job)
        else:
            self._jobs.admit(job)

    # -- what the record says of jobs, from any thread

    def _on_wish(self, job: str, wish: Wish) -> None:
        def obey() -> None:
            self._jobs.obey(job, wish)
            self._children.obey(job, wish)

        self._inbox.put(obey)

    # -- tenants that are erased, from the heartbeat's thread

    def _tenants(self) -> set[str]:
        own = {tenant_of(self._options.weights)} if self._options.weights else set()
        return own | self._folders.tenants | self._slots.tenants

    def _on_erased(self, tenant: str) -> None:
        """Forget a tenant's adapters; where its model is what is held here, end."""
        self._folders.forget(tenant)
        self._inbox.put(lambda: self._slots.forget(tenant))
        if self._options.weights and tenant_of(self._options.weights) == tenant:
            self.stop()

    def _drop(self, job: str) -> None:
        self._jobs.drop(job)
        self._children.drop(job)

    def _give_up(self, job: str, error: Exception) -> None:
        """A record failed for a reason of its own: the job ends here and goes on elsewhere when the lease runs out."""
        logger.error("the job is let go", extra={"job": job}, exc_info=error)
        self._drop(job)


def run_worker(record: WorkRecord, blobs: Blobs, options: WorkerOptions) -> None:
    """Run a worker in this process until SIGTERM or SIGINT, which save its jobs first."""
    worker = ServiceWorker(record, blobs, options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
