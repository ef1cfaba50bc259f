"""What other threads hand over to the one that runs the base: calls, made there in the order in which they came."""

from __future__ import annotations

import queue
from collections.abc import Callable


class Inbox:
    """A queue of calls. `put` may be called from any thread, everything else from the thread that runs the base."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue()

    def put(self, work: Callable[[], None]) -> None:
        """Let the thread that runs the base do this between two forwards."""
        self._queue.put(work)

    @property
    def is_empty(self) -> bool:
        return self._queue.empty()

    def wait(self, seconds: float) -> None:
        """Do one piece of work, or none if none comes in time."""
        try:
            work = self._queue.get(timeout=seconds)
        except queue.Empty:
            return
        work()

    def take_all(self) -> None:
        """Do all that is there, and what comes meanwhile."""
        while True:
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return
            work()

    def take_only(self, kind: type) -> None:
        """Do what is of this class, and leave the rest in its order."""
        others: list[Callable[[], None]] = []
        while True:
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                break
            if isinstance(work, kind):
                work()
            else:
                others.append(work)
        for work in others:
            self._queue.put(work)
