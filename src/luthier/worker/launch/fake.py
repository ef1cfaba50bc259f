"""A launcher without processes, for tests: each rank says what a script has it say, and ends as the script says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class FakeRank:
    """A rank that says `says`, and ends `after_seconds` later; None never ends it.

    Attributes:
        says: Its messages.
        dies: How its process ends, where that is told by its code or signal.
        heeds_stop: Whether being asked to stop ends it, as an interrupted process ends.
        was_stopped, was_killed: What was asked of it.
    """

    says: list[dict[str, Any]] = field(default_factory=list)
    after_seconds: float | None = 0.0
    dies: str = "its process ended with code 1"
    heeds_stop: bool = True
    was_stopped: bool = False
    was_killed: bool = False
    is_closed: bool = False
    _started: float = field(default_factory=time.monotonic)

    @property
    def has_ended(self) -> bool:
        """As `RankProcess.has_ended`."""
        is_over = self.after_seconds is not None and time.monotonic() - self._started >= self.after_seconds
        return is_over or self.was_killed or (self.was_stopped and self.heeds_stop)

    def messages(self) -> list[dict[str, Any]]:
        """All of its messages, once."""
        said, self.says = self.says, []
        return said

    def problem(self) -> str:
        return self.dies

    def stop(self) -> None:
        if not self.has_ended:
            self.was_stopped = True
            self.says += [{"verb": "interrupted"}] if self.heeds_stop else []

    def kill(self) -> None:
        self.was_killed = self.was_killed or not self.has_ended

    def close(self) -> None:
        self.is_closed = True


class FakeLauncher:
    """Gives the ranks of a script, and keeps the order."""

    def __init__(self, ranks: Sequence[FakeRank]) -> None:
        self.ranks = list(ranks)
        self.order: dict[str, Any] = {}

    def start(self, order: dict[str, Any], size: int, scratch: Path) -> list[FakeRank]:
        """As `Launcher.start`."""
        if size != len(self.ranks):
            raise ValueError(f"the script has {len(self.ranks)} ranks, and {size} are asked for")
        self.order = order
        return self.ranks
