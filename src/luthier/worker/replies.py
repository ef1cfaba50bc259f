"""Replies on the resident base: requests come in from the endpoint's thread, tokens go back to it.

Rendering, fetching an adapter's files and building a grammar happen in the endpoint's threads; only loading a slot and
the forwards happen in the thread that runs the base.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.base.load import Base
from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.engine.pack import BASE_SLOT
from luthier.engine.request import Constraint, TokenLogprob
from luthier.engine.sample import Request, Sampler, SamplingError, SamplingParams, TokenEvent
from luthier.errors import LuthierError
from luthier.registry.seam import SampleEvent, SampleRequest
from luthier.tasks.chat.parse import parse_messages
from luthier.worker.adapters import AdapterFolders, ServedSlots
from luthier.worker.grammar import Grammars

MAX_WAITING = 256
DEFAULT_MAX_TOKENS = 2048


@dataclass
class Task:
    """A request, ready to be sampled.

    Attributes:
        tokens: The rendered prompt.
        renderer: Tokenizer of the adapter, or of the base.
        folder: The adapter's files; None for the base.
        emit: Takes events, from any thread.
        is_gone: The caller has gone away.
        num_tokens: Choice -> tokens of its reply so far, without the stop token.
    """

    request: SampleRequest
    tokens: NDArray[np.int32]
    renderer: Renderer
    folder: Path | None
    constraints: list[Constraint | None]
    emit: Callable[[SampleEvent], None]
    is_gone: bool = False
    open_choices: set[int] = field(default_factory=set)
    num_tokens: Counter[int] = field(default_factory=Counter)


class TaskMaker:
    """From a request to a task. Safe to use from several threads."""

    def __init__(self, renderer: Renderer, folders: AdapterFolders, vocabulary_size: int) -> None:
        self._renderer = renderer
        self._folders = folders
        self._vocabulary_size = vocabulary_size
        self._grammars: dict[int, Grammars] = {}

    def make(self, request: SampleRequest, emit: Callable[[SampleEvent], None]) -> Task:
        """Render the prompt, fetch the adapter, build the grammar.

        Raises:
            LuthierError: for a conversation that the template refuses, a schema that cannot be followed, lost files.
        """
        folder, own = (None, None) if request.adapter is None else self._folders.fetch(request.adapter)
        renderer = own or self._renderer
        tokens = _prompt(request, renderer)
        constraints: list[Constraint | None] = [None] * request.num_choices
        if request.grammar is not None:
            if id(renderer) not in self._grammars:
                self._grammars[id(renderer)] = Grammars(renderer, self._vocabulary_size)
            grammars = self._grammars[id(renderer)]
            constraints = [grammars.constraint(request.grammar) for _ in range(request.num_choices)]
        return Task(request, np.array(tokens, dtype=np.int32), renderer, folder, constraints, emit)


class Replies:
    """Runs tasks on the base. For the thread that runs the base.

    Args:
        max_prefill_tokens: Most prompt tokens in one forward: it bounds how long the others' next token waits.
        home: Index of the slot that answers a request without an adapter.
    """

    def __init__(
        self, base: Base, renderer: Renderer, slots: ServedSlots, max_prefill_tokens: int, home: int = BASE_SLOT
    ) -> None:
        self._base = base
        self._slots = slots
        self._home = home
        self._sampler = Sampler(base, renderer.decode, max_prefill_tokens=max_prefill_tokens)
        self._tasks: dict[str, Task] = {}
        self._of_name: dict[str, tuple[Task, int]] = {}
        self.last_used_at = time.monotonic()

    @property
    def has_work(self) -> bool:
        return self._sampler.has_work

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    def note_use(self) -> None:
        """Somebody asked something of the base."""
        self.last_used_at = time.monotonic()

    def begin(self, task: Task) -> None:
        """Take a task in; what is wrong with it goes to its caller."""
        request = task.request
        self.note_use()
        if request.id in self._tasks:
            task.emit(SampleEvent(problem="a request with this id is here already", status=400))
            return
        try:
            slot = self._home
            if request.adapter is not None and task.folder is not None:
                slot = self._slots.borrow(request.adapter, task.folder).index
            self._tasks[request.id] = task
            for choice in range(request.num_choices):
                name = f"{request.id}/{choice}"
                self._sampler.submit(self._engine_request(name, task, choice, slot))
                self._of_name[name] = task, choice
                task.open_choices.add(choice)
        except LuthierError as error:
            self._abandon(task)
            task.emit(SampleEvent(problem=one_line(error), status=400))

    def step(self) -> None:
        """One forward for all replies."""
        self.last_used_at = time.monotonic()
        for task in [task for task in self._tasks.values() if task.is_gone]:
            self._abandon(task)
        if not self._sampler.has_work:
            return
        for event in self._sampler.step():
            found = self._of_name.get(event.name)
            if found is None:
                continue
            task, choice = found
            task.num_tokens[choice] += event.token is not None and event.token not in task.renderer.stop_ids
            task.emit(_as_event(event, choice, task))
            if event.completion is not None:
                del self._of_name[event.name]
                task.open_choices.discard(choice)
                if not task.open_choices:
                    self._close(task)

    def end_all(self, problem: str) -> None:
        """Tell every caller that no more will come."""
        for task in list(self._tasks.values()):
            task.emit(SampleEvent(problem=problem, status=503))
            self._abandon(task)

    def _engine_request(self, name: str, task: Task, choice: int, slot: int) -> Request:
        request, positions = task.request, self._base.max_positions
        room = DEFAULT_MAX_TOKENS if positions is None else max(1, positions - len(task.tokens))
        params = SamplingParams(
            max_new_tokens=min(request.max_tokens or DEFAULT_MAX_TOKENS, room),
            temperature=request.temperature,
            top_p=request.top_p,
            # The counter that draws takes 32 bits; choices draw apart.
            seed=(request.seed * 1_000_003 + choice) % 2**32,
            stop_ids=tuple(task.renderer.stop_ids),
            stop_strings=request.stop,
            num_logprobs=request.num_logprobs,
        )
        return Request(name, task.tokens, slot, params, task.constraints[choice], task.renderer.decode)

    def _abandon(self, task: Task) -> None:
        for choice in range(task.request.num_choices):
            name = f"{task.request.id}/{choice}"
            if self._of_name.pop(name, None) is not None:
                self._sampler.cancel(name)
        if task.request.id in self._tasks:
            self._close(task)

    def _close(self, task: Task) -> None:
        del self._tasks[task.request.id]
        if task.request.adapter is not None and task.folder is not None:
            self._slots.give_back(task.request.adapter)


def _prompt(request: SampleRequest, renderer: Renderer) -> list[int]:
    if renderer.sep_id is not None:
        raise SamplingError(
            "the base is an encoder, which reads texts and does not write",
            "a base that writes, or rows for a model tuned on an encoder over /v1/luthier/predict",
        )
    try:
        if request.messages is not None:
            if not renderer.can_chat:
                raise SamplingError("this base has no chat template", fix="use /v1/completions")
            return renderer.chat_prompt(parse_messages(request.messages), request.tools)
        if isinstance(request.prompt, str):
            return renderer.with_bos(renderer.encode(request.prompt))
        return list(request.prompt or [])
    except RowError as error:
        raise SamplingError(f"{error.field}: {error.found}" if error.field else error.found, error.expected) from None


def _as_event(event: TokenEvent, choice: int, task: Task) -> SampleEvent:
    completion = event.completion
    if completion is not None and completion.finish_reason == "cancelled":
        return SampleEvent(choice, problem=completion.problem or "the reply was cancelled", status=500)
    logprobs = None
    is_stop_token = event.token is not None and event.token in task.renderer.stop_ids
    if event.logprob is not None and not is_stop_token:
        logprobs = [_logprob(event.logprob, task.renderer)]
    return SampleEvent(
        choice,
        event.text_delta,
        logprobs,
        event.finish_reason if event.finish_reason != "cancelled" else None,
        num_prompt_tokens=len(task.tokens),
        num_tokens=task.num_tokens[choice],
    )


def _logprob(entry: TokenLogprob, renderer: Renderer) -> dict[str, Any]:
    def told(token: int, logprob: float) -> dict[str, Any]:
        text = renderer.decode([token], skip_special=False)
        return {"token": text, "bytes": list(text.encode("utf-8", "replace")), "logprob": max(logprob, -9999.0)}

    return {**told(entry.token, entry.logprob), "top": [told(token, value) for token, value in entry.top]}


def one_line(error: LuthierError) -> str:
    parts = [error.found, f"expected {error.expected}" if error.expected else ""]
    return "; ".join(part for part in parts if part)
