"""What a child process tells its parent: one JSON object a line, each a verb of `Progress` or how the run ended.

{"verb": "step", "arguments": ["runs/full", 3, 2.1, 412.0, 1e-05]}
{"verb": "result", "status": "done", "evaluation": {...}, "result": {...}}
{"verb": "error", "kind": "ModelError", "found": "...", "expected": "...", "fix": "..."}
{"verb": "interrupted"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TextIO

from luthier import errors
from luthier.errors import LuthierError
from luthier.worker.progress import Level, Progress

PROGRESS_VERBS = ("stage", "facts", "start", "step", "evaluation", "note", "finish")


class SendingProgress:
    """A `Progress` that writes each verb down as a message.

    Args:
        file: Where lines go; each is flushed.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def send(self, **message: Any) -> None:
        """Write one message."""
        self._file.write(json.dumps(message, ensure_ascii=False, default=str) + "\n")
        self._file.flush()

    def stage(self, message: str) -> None:
        self._verb("stage", message)

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        self._verb("facts", title, rows)

    def start(self, job: str, total_steps: int) -> None:
        self._verb("start", job, total_steps)

    def step(self, job: str, step: int, loss: float, tokens_per_second: float, learning_rate: float) -> None:
        self._verb("step", job, step, loss, tokens_per_second, learning_rate)

    def evaluation(self, job: str, what: str, done: int, total: int) -> None:
        self._verb("evaluation", job, what, done, total)

    def note(self, message: str, level: Level = "info") -> None:
        self._verb("note", message, level)

    def finish(self, job: str, summary: str) -> None:
        self._verb("finish", job, summary)

    def close(self) -> None:
        """Nothing is held open."""

    def _verb(self, verb: str, *arguments: Any) -> None:
        self.send(verb=verb, arguments=arguments)


def relay(message: dict[str, Any], progress: Progress) -> None:
    """Say to `progress` what a child's message says."""
    arguments = message["arguments"]
    if message["verb"] == "facts":
        title, rows = arguments
        arguments = [title, [(name, value) for name, value in rows]]
    say: Callable[..., None] = getattr(progress, message["verb"])
    say(*arguments)


def error_message(error: LuthierError) -> dict[str, Any]:
    """An error that a user can mend, as a message."""
    return {
        "verb": "error",
        "kind": type(error).__name__,
        "found": error.found,
        "expected": error.expected,
        "fix": error.fix,
    }


def error_of(message: dict[str, Any]) -> LuthierError:
    """The error again."""
    kind = getattr(errors, str(message["kind"]), LuthierError)
    return kind(message["found"], message["expected"], message["fix"])


def own_messages() -> TextIO:
    """The real standard output, kept for messages: what libraries print goes to standard error from now on."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return messages
