"""What the worker's endpoint asks of the thread that runs the base, from threads of its own."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from luthier.errors import ModelError
from luthier.registry.problems import UnavailableError
from luthier.registry.seam import Predictions, PredictRequest, SampleEvent, SampleRequest
from luthier.worker.adapters import AdapterFolders, ServedSlots
from luthier.worker.inbox import Inbox
from luthier.worker.predict import ANSWER_SECONDS, Predictor
from luthier.worker.replies import Replies, Task, TaskMaker
from luthier.worker.resident import Resident
from luthier.worker.task_file import TASK_FILE, read_task

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answering:
    """Part of an answer on its way into the loop; told apart from other work, for evaluations let answers go on."""

    act: Callable[[], None]

    def __call__(self) -> None:
        self.act()


class ReplyDesk:
    """Implements `luthier.worker.endpoint.Desk`: requests are prepared here and answered in the inbox's thread.

    Args:
        max_tokens: Most tokens in one forward of a prediction.
    """

    def __init__(
        self,
        resident: Resident,
        replies: Replies,
        slots: ServedSlots,
        folders: AdapterFolders,
        inbox: Inbox,
        max_tokens: int,
    ) -> None:
        self._resident = resident
        self._replies = replies
        self._slots = slots
        self._folders = folders
        self._inbox = inbox
        self._max_tokens = max_tokens
        self._maker = TaskMaker(resident.renderer, folders, resident.base.vocabulary_size)

    @property
    def num_open(self) -> int:
        return self._replies.num_open

    def make(self, request: SampleRequest, emit: Callable[[SampleEvent], None]) -> Task:
        return self._maker.make(request, emit)

    def submit(self, task: Task) -> None:
        self._inbox.put(Answering(lambda: self._replies.begin(task)))

    def predict(self, request: PredictRequest, is_gone: threading.Event) -> Predictions:
        resident = self._resident
        if request.adapter is None:
            folder, own = None, None
            if not (resident.folder / TASK_FILE).exists():
                raise ModelError("this model was tuned for no task", fix="chat with it")
        else:
            folder, own = self._folders.fetch(request.adapter)
        predictor = Predictor(
            resident.base,
            own or resident.renderer,
            read_task(folder or resident.folder),
            folder,
            _Loop(self, request.adapter, folder, is_gone),
            self._max_tokens,
        )
        return predictor.predict(request)

    def with_slot(self, adapter: str | None, folder: Path | None, act: Callable[[int], Result]) -> Result:
        """Do something with a model's slot in the thread that runs the base, and wait for it."""
        done: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def on_slot() -> Result:
            if adapter is None or folder is None:
                return act(self._resident.home)
            slot = self._slots.borrow(adapter, folder)
            try:
                return act(slot.index)
            finally:
                self._slots.give_back(adapter)

        def work() -> None:
            self._replies.note_use()
            try:
                done.set_result(on_slot())
            except Exception as error:
                done.set_exception(error)

        self._inbox.put(Answering(work))
        try:
            return done.result(timeout=ANSWER_SECONDS)
        except concurrent.futures.TimeoutError:
            raise UnavailableError("the worker did not answer in time; send the request again") from None


@dataclass(frozen=True)
class _Loop:
    """Implements `luthier.worker.predict.OnBase` for one model."""

    desk: ReplyDesk
    adapter: str | None
    folder: Path | None
    is_gone: threading.Event

    def check_heard(self) -> None:
        if self.is_gone.is_set():
            raise UnavailableError("the caller went away")

    def with_slot(self, act: Callable[[int], Result]) -> Result:
        self.check_heard()
        return self.desk.with_slot(self.adapter, self.folder, act)

    def submit(self, task: Task) -> None:
        self.desk.submit(task)
