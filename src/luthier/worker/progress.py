"""What a run tells whoever watches it: one page of verbs, and a watcher that stays silent.

The engine's side calls these verbs and never asks what they become. The command line shows them as bars or as lines
(`luthier.cli.progress`); Python callers get silence unless they pass a `Progress` of their own.
"""

from __future__ import annotations

from typing import Literal, Protocol

Level = Literal["info", "warning"]


def gib(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


class Progress(Protocol):
    """Hears of a run as it happens. No verb may raise, block, or change the run.

    A `job` is named by the same string in every verb, unique among the jobs that train together.
    """

    def stage(self, message: str) -> None:
        """A new part of the work begins, as in "Loading the base"."""

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        """What is known before the start: (name, value) pairs about the data, what is trainable, or memory."""

    def start(self, job: str, total_steps: int) -> None:
        """The job begins or resumes; `total_steps` counts its whole training, steps done before a resume included."""

    def step(self, job: str, step: int, loss: float, tokens_per_second: float, learning_rate: float) -> None:
        """The job's `step`-th optimizer step (from 1, counted over resumes) is done."""

    def evaluation(self, job: str, what: str, done: int, total: int) -> None:
        """`done` of `total` rows of an evaluation are judged; `what` names it, as in "base, replies"."""

    def note(self, message: str, level: Level = "info") -> None:
        """Something worth a line; a warning is shown even to those who asked for quiet."""

    def finish(self, job: str, summary: str) -> None:
        """The job has ended, well or not; `summary` says how in one line."""

    def close(self) -> None:
        """Nothing more will come. May be called more than once."""


class SilentProgress:
    """Hears everything and says nothing."""

    def stage(self, message: str) -> None:
        pass

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        pass

    def start(self, job: str, total_steps: int) -> None:
        pass

    def step(self, job: str, step: int, loss: float, tokens_per_second: float, learning_rate: float) -> None:
        pass

    def evaluation(self, job: str, what: str, done: int, total: int) -> None:
        pass

    def note(self, message: str, level: Level = "info") -> None:
        pass

    def finish(self, job: str, summary: str) -> None:
        pass

    def close(self) -> None:
        pass
