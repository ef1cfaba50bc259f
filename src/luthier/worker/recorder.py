"""Records what the worker does, in order, in a thread of its own: no forward waits for a database or a bucket."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from luthier.errors import StorageError
from luthier.registry.problems import LeaseLostError

logger = logging.getLogger("luthier.worker")

MAX_WAITING = 64
RETRY_SECONDS = 1.0


class Recorder:
    """A queue of verbs. A store that is away is tried again until it is back; the queue's length holds training up.

    Args:
        on_lost: Told of a job that is no longer ours.
        on_error: Told of a job whose record failed for another reason.
    """

    def __init__(self, on_lost: Callable[[str], None], on_error: Callable[[str, Exception], None]) -> None:
        self._on_lost = on_lost
        self._on_error = on_error
        self._queue: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    @property
    def is_behind(self) -> bool:
        """Whether so much waits that training should."""
        return self._queue.qsize() > MAX_WAITING

    def put(self, job: str, verb: Callable[[], None]) -> None:
        """Record something about a job, after all that was put before."""
        self._queue.put((job, verb))

    def close(self, timeout_seconds: float) -> None:
        """Record what waits, and end."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            job, verb = item
            while True:
                try:
                    verb()
                except LeaseLostError:
                    self._on_lost(job)
                except StorageError as error:
                    logger.warning("the store does not answer; trying again", extra={"job": job, "problem": str(error)})
                    time.sleep(RETRY_SECONDS)
                    continue
                except Exception as error:
                    logger.exception("a record failed", extra={"job": job})
                    self._on_error(job, error)
                break
