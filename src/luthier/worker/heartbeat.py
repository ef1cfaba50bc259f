"""The worker's heartbeat: a thread that renews leases, brings wishes, and claims jobs while there is room."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from luthier.registry.seam import ClaimedJob, Wish, WorkRecord

logger = logging.getLogger("luthier.worker")

CLAIM_SECONDS = 0.5
MAX_CLAIMED_AT_ONCE = 4


class Heartbeat:
    """Beats in a thread from `start` until `is_over` is set.

    Args:
        worker: The worker's id.
        room: How many more jobs it may take now.
        free_bytes: How much memory they may take.
        on_wish: Told what is asked of a job that it holds.
        on_claimed: Given each job that was claimed.
        tenants: Whose things the worker has.
        on_erased: Told of each of them that is no more.
        is_over: Ends the thread.
    """

    def __init__(
        self,
        record: WorkRecord,
        worker: str,
        lease_seconds: float,
        *,
        room: Callable[[], int],
        free_bytes: Callable[[], int],
        on_wish: Callable[[str, Wish], None],
        on_claimed: Callable[[ClaimedJob], None],
        tenants: Callable[[], set[str]],
        on_erased: Callable[[str], None],
        is_over: threading.Event,
    ) -> None:
        self._record = record
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._room = room
        self._free_bytes = free_bytes
        self._on_wish = on_wish
        self._on_claimed = on_claimed
        self._tenants = tenants
        self._on_erased = on_erased
        self._is_over = is_over
        self._next_at = 0.0

    def start(self) -> None:
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        while not self._is_over.wait(CLAIM_SECONDS):
            try:
                self._beat()
            except Exception:
                logger.exception("the store does not answer the heartbeat; trying again")

    def _beat(self) -> None:
        if time.monotonic() >= self._next_at:
            wishes = self._record.heartbeat(self._worker, self._lease_seconds, self._free_bytes())
            for job, wish in wishes.items():
                self._on_wish(job, wish)
            for tenant in self._record.erased(self._tenants()):
                self._on_erased(tenant)
            self._next_at = time.monotonic() + self._lease_seconds / 4
        num_wanted = min(self._room(), MAX_CLAIMED_AT_ONCE)
        for claimed in self._record.claim(self._worker, num_wanted, self._lease_seconds):
            self._on_claimed(claimed)
