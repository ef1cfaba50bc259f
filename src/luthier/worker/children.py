"""Jobs in processes of their own, beside what this process trains: admitted by memory, watched, stopped."""

from __future__ import annotations

import subprocess
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.recipe import Recipe
from luthier.worker.child_process import ChildProcess
from luthier.worker.killed import mark_killed
from luthier.worker.messages import PROGRESS_VERBS, error_of, relay
from luthier.worker.progress import Progress, gib
from luthier.worker.result import RunResult
from luthier.worker.run_folder import RunFolder

STOP_SECONDS = 120.0
"""How long a child may take to save before it is killed."""

NO_SCORES: dict[str, Any] = {"num_rows": 0, "base": {}, "tuned": {}}


@dataclass
class Child:
    """One job's process.

    Attributes:
        ending: The last message but progress: a result, an error, or an interruption.
    """

    recipe: Recipe
    running: ChildProcess
    ending: dict[str, Any] | None = None

    @classmethod
    def start(cls, recipe: Recipe, need_bytes: int, *, resume: bool, on_gpu: bool = False) -> Child:
        """Start the process and hand it its recipe."""
        order = {"recipe": recipe.model_dump(mode="json"), "resume": resume}
        return cls(recipe, ChildProcess.spawn("luthier.worker.child", order, need_bytes, on_gpu=on_gpu))

    @property
    def name(self) -> str:
        return str(Path(self.recipe.output))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.running.process

    def drain(self, progress: Progress) -> None:
        """Pass on what it has said."""
        for message in self.running.messages():
            if message["verb"] in PROGRESS_VERBS:
                self.running.has_stepped = self.running.has_stepped or message["verb"] == "step"
                relay(message, progress)
            else:
                self.ending = message


class Children:
    """Jobs that run apart: the exclusive ones of a `luthier train`, or a method of a comparison.

    Args:
        waiting: Recipes with the memory that each is predicted to take, in the order in which they are admitted.
        resume: As `train` takes it.
        progress: Hears of them all.
        way_on: What goes on with one whose process died, as a sentence's subject.
        device: Where they train, as torch names it: whose memory it is that they take.
    """

    def __init__(
        self,
        waiting: list[tuple[Recipe, int]],
        *,
        resume: bool,
        progress: Progress,
        way_on: str = "`luthier train ... --resume`",
        device: str = "cpu",
    ) -> None:
        self.waiting = deque(waiting)
        self.resume = resume
        self.progress = progress
        self.way_on = way_on
        self.device = device
        self.running: list[Child] = []
        self.results: dict[str, RunResult] = {}
        self.errors: list[LuthierError] = []
        self._told_to_wait: set[str] = set()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self, free_bytes: int, *, beside_others: bool) -> None:
        """Start those that fit into what is free, in order.

        Args:
            free_bytes: Free memory that nothing else here is about to take.
            beside_others: Whether something else runs here. If nothing does, the first starts in any case: it measures
                for itself, and shrinks its micro-batch or says what is missing.
        """
        while self.waiting:
            recipe, need = self.waiting[0]
            free = free_bytes - sum(child.running.bytes_to_come for child in self.running)
            if need > free and (beside_others or self.running):
                if recipe.output not in self._told_to_wait:
                    self._told_to_wait.add(recipe.output)
                    self.progress.note(
                        f"{recipe.output} waits until others are done: it needs about {gib(need)}, and "
                        f"{gib(max(0, free))} are free beside them"
                    )
                return
            self.waiting.popleft()
            on_gpu = self.device.startswith("cuda")
            self.running.append(Child.start(recipe, need, resume=self.resume, on_gpu=on_gpu))

    def poll(self) -> None:
        """Pass on what the children say, and take in those that have ended."""
        for child in list(self.running):
            has_ended = child.running.has_ended  # asked first, so that nothing said before the end is missed
            child.drain(self.progress)
            if has_ended:
                self.running.remove(child)
                child.running.close()
                self._take_end(child)

    def stop(self) -> None:
        """Let every child save and end; those that wait do not begin."""
        self.waiting.clear()
        for child in self.running:
            child.running.stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self.running:
            self.poll()
            if time.monotonic() > deadline:
                for child in self.running:
                    child.process.kill()
            time.sleep(0.02)

    def _take_end(self, child: Child) -> None:
        ending, path = child.ending or {}, Path(child.recipe.output)
        if ending.get("verb") == "result":
            self.results[child.recipe.output] = RunResult(
                path, ending["status"], ending["evaluation"], ending["result"]
            )
            return
        if ending.get("verb") == "interrupted":
            return
        if ending.get("verb") == "error":
            error = error_of(ending)
            self.errors.append(error)
            said = problem = error.message
        else:
            problem = child.running.problem()
            self._mark_failed(path, problem)
            said = f"{problem}; {self.way_on} goes on from its last checkpoint"
        self.progress.note(f"{child.name} failed: {said}", "warning")
        self.results[child.recipe.output] = RunResult(path, "failed", NO_SCORES, {"stopped_because": problem})

    @staticmethod
    def _mark_failed(path: Path, problem: str) -> None:
        folder = RunFolder(path)
        if folder.has_state:
            mark_killed(folder, problem)
