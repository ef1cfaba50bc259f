"""Exclusive jobs in processes of their own, beside what this process trains: admitted by memory, watched, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from luthier.errors import LuthierError
from luthier.recipe import Recipe
from luthier.worker.killed import mark_killed
from luthier.worker.messages import PROGRESS_VERBS, error_of, relay
from luthier.worker.progress import Progress
from luthier.worker.run import RunResult
from luthier.worker.run_folder import RunFolder

STOP_SECONDS = 120.0
"""How long a child may take to save before it is killed."""

NUM_LAST_WORDS = 4
NO_SCORES: dict[str, Any] = {"num_rows": 0, "base": {}, "tuned": {}}


@dataclass
class Child:
    """One exclusive job's process.

    Attributes:
        need_bytes: Predicted memory.
        ending: The last message but progress: a result, an error, or an interruption.
        last_words: The end of its standard error.
    """

    recipe: Recipe
    need_bytes: int
    process: subprocess.Popen[bytes]
    inbox: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    ending: dict[str, Any] | None = None
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_LAST_WORDS))
    readers: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def start(cls, recipe: Recipe, need_bytes: int, *, resume: bool) -> Child:
        """Start the process and hand it its recipe."""
        process = subprocess.Popen(
            [sys.executable, "-m", "luthier.worker.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )
        child = cls(recipe, need_bytes, process)
        child.readers = [
            threading.Thread(target=read, daemon=True) for read in (child._read_messages, child._read_words)
        ]
        for reader in child.readers:
            reader.start()
        assert process.stdin is not None
        order = {"recipe": recipe.model_dump(mode="json"), "resume": resume}
        with contextlib.suppress(BrokenPipeError):  # it died at once; its end says so
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        return child

    @property
    def name(self) -> str:
        return str(Path(self.recipe.output))

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone and all that it said has been read."""
        return self.process.poll() is not None and not any(reader.is_alive() for reader in self.readers)

    @property
    def bytes_to_come(self) -> int:
        """What it is predicted to take beyond what it holds now."""
        try:
            held = psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return 0
        return max(0, self.need_bytes - held)

    def drain(self, progress: Progress) -> None:
        """Pass on what it has said."""
        while True:
            try:
                message = self.inbox.get_nowait()
            except queue.Empty:
                return
            if message["verb"] in PROGRESS_VERBS:
                relay(message, progress)
            else:
                self.ending = message

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def problem(self) -> str:
        """Why it ended without a result, in one line."""
        code = self.process.returncode
        words = " ".join(line.strip() for line in self.last_words if line.strip())[-300:]
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
            hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        else:
            how, hint = f"ended with code {code}", ""
        return f"its process {how}{hint}" + (f"; its last words: {words}" if words else "")

    def _read_messages(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                self.inbox.put(json.loads(line))

    def _read_words(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last_words.append(line.decode(errors="replace"))


class Children:
    """All exclusive jobs of one `luthier train`.

    Args:
        waiting: Recipes with the memory that each is predicted to take, in the order in which they are admitted.
        resume: As `train` takes it.
        progress: Hears of them all.
    """

    def __init__(self, waiting: list[tuple[Recipe, int]], *, resume: bool, progress: Progress) -> None:
        self.waiting = deque(waiting)
        self.resume = resume
        self.progress = progress
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
            free = free_bytes - sum(child.bytes_to_come for child in self.running)
            if need > free and (beside_others or self.running):
                if recipe.output not in self._told_to_wait:
                    self._told_to_wait.add(recipe.output)
                    self.progress.note(
                        f"{recipe.output} waits until others are done: it needs about {_gib(need)}, and {_gib(free)} "
                        "are free beside them"
                    )
                return
            self.waiting.popleft()
            self.running.append(Child.start(recipe, need, resume=self.resume))

    def poll(self) -> None:
        """Pass on what the children say, and take in those that have ended."""
        for child in list(self.running):
            has_ended = child.has_ended  # asked first, so that nothing said before the end is missed
            child.drain(self.progress)
            if has_ended:
                self.running.remove(child)
                child.close()
                self._take_end(child)

    def stop(self) -> None:
        """Let every child save and end; those that wait do not begin."""
        self.waiting.clear()
        for child in self.running:
            child.stop()
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
            problem = error.message
        else:
            problem = child.problem()
            self._mark_failed(path, problem)
            problem += "; `luthier train ... --resume` goes on from its last checkpoint"
        self.progress.note(f"{child.name} failed: {problem}", "warning")
        self.results[child.recipe.output] = RunResult(path, "failed", NO_SCORES, {"stopped_because": problem})

    @staticmethod
    def _mark_failed(path: Path, problem: str) -> None:
        folder = RunFolder(path)
        if folder.has_state:
            mark_killed(folder, problem)


def _gib(num_bytes: int) -> str:
    return f"{max(0, num_bytes) / 2**30:.2f} GiB"
