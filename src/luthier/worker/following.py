"""A run as the other ranks than the first have it: the same job on the same data, and nothing written.

It takes part in all that the ranks sum (steps, validations, digests at checkpoints), in the order in which `Run` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.data.template import Renderer
from luthier.engine.own import OwnSlot
from luthier.engine.ranks import wait_for_all
from luthier.engine.slot import Slot
from luthier.recipe import Recipe
from luthier.worker.children import NO_SCORES
from luthier.worker.loading import prepare_data
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.result import RunResult
from luthier.worker.run import Run
from luthier.worker.run_folder import RunFolder


class FollowedFolder(RunFolder):
    """A run folder that another process writes. Its state stays as it was found, whatever becomes of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._state = super().state()

    def state(self) -> dict[str, Any]:
        return dict(self._state)

    def set_state(self, status: str, **more: Any) -> None:
        """The first rank says it."""

    def append_metric(self, **values: Any) -> None:
        """The first rank writes it."""

    def rewind_metrics(self, step: int) -> None:
        """The first rank does it."""


class FollowingRun(Run):
    """A run whose folder another process has begun."""

    @classmethod
    def begin(cls, recipe: Recipe, base_folder: Path, progress: Progress, *, resume: bool) -> FollowingRun:
        """Open what the first rank has begun and prepared."""
        renderer = Renderer.load(base_folder, recipe.method.new_tokens)
        folder = FollowedFolder(Path(recipe.output))
        data = prepare_data(recipe, renderer, folder.path / "data")
        # A run that began just now has no checkpoint and no result to go on from.
        return cls(recipe, folder, renderer, data, SilentProgress(), resumed=resume)

    def _settle_reference(self, slot: Slot | OwnSlot) -> None:
        wait_for_all(self.ranks)
        self._ask_reference(slot)  # it finds what the first rank has written

    def judge_base(self) -> None:
        """The first rank does it, while this one waits at its first step."""

    def finish(self, peak_memory_bytes: int, device: str) -> RunResult:
        """Training is over: the first rank judges, writes and tells; here are no scores."""
        status = "failed" if self.job.state == "failed" else "done"
        return RunResult(self.folder.path, status, NO_SCORES, {"stopped_because": self.job.problem})

    def _write_checkpoint(self, step: int) -> None:
        """The first rank writes it."""
