"""What the worker's endpoint asks of the thread that runs the base, from threads of its own."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.registry.seam import SampleEvent, SampleRequest
from luthier.worker.adapters import AdapterFolders, ServedSlots
from luthier.worker.inbox import Inbox
from luthier.worker.predict import predict
from luthier.worker.replies import Replies, Task, TaskMaker
from luthier.worker.resident import Resident

PREDICT_SECONDS = 600.0


@dataclass(frozen=True)
class Begin:
    """A request on its way into the loop; told apart from other work, for evaluations let requests in."""

    replies: Replies
    task: Task

    def __call__(self) -> None:
        self.replies.begin(self.task)


class ReplyDesk:
    """Implements `luthier.worker.endpoint.Desk`: requests are prepared here and answered in the inbox's thread."""

    def __init__(
        self, resident: Resident, replies: Replies, slots: ServedSlots, folders: AdapterFolders, inbox: Inbox
    ) -> None:
        self._resident = resident
        self._replies = replies
        self._slots = slots
        self._folders = folders
        self._inbox = inbox
        self._maker = TaskMaker(resident.renderer, folders, resident.base.vocabulary_size)

    @property
    def num_open(self) -> int:
        return self._replies.num_open

    def make(self, request: SampleRequest, emit: Callable[[SampleEvent], None]) -> Task:
        return self._maker.make(request, emit)

    def submit(self, task: Task) -> None:
        self._inbox.put(Begin(self._replies, task))

    def predict(self, adapter: str | None, texts: list[str]) -> dict[str, Any]:
        resident = self._resident
        fetched = None if adapter is None else self._folders.fetch(adapter)
        done: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()

        def answer() -> dict[str, Any]:
            if adapter is None or fetched is None:
                return predict(resident.base, resident.home_slot(), resident.renderer, resident.folder, texts)
            folder, own = fetched
            slot = self._slots.borrow(adapter, folder)
            try:
                return predict(resident.base, slot, own or resident.renderer, folder, texts)
            finally:
                self._slots.give_back(adapter)

        def work() -> None:
            try:
                done.set_result(answer())
            except Exception as error:
                done.set_exception(error)

        self._inbox.put(work)
        return done.result(timeout=PREDICT_SECONDS)
