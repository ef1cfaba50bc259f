"""The seam between a training and what starts its processes: one verb, and what can be asked of a process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class RankProcess(Protocol):
    """A process of a training, as its launcher shows it."""

    @property
    def has_ended(self) -> bool:
        """Whether it is gone and all that it said can be read."""

    def messages(self) -> list[dict[str, Any]]:
        """What it has said since this was asked last, as `worker/messages.py` has it."""

    def problem(self) -> str:
        """How it ended, as a sentence that begins with "its process"; asked only of one that said no ending."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once; nothing happens to one that is gone."""

    def close(self) -> None:
        """Let go of what watching it held."""


class Launcher(Protocol):
    """Starts processes, on this machine or others."""

    def start(self, order: dict[str, Any], size: int, scratch: Path) -> Sequence[RankProcess]:
        """Start `size` processes that train together, each with its place.

        Args:
            order: What each is to do: the recipes, and whether they resume.
            scratch: An empty folder that lasts as long as the processes.
        """
