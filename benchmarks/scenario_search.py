"""Many runs of the scenarios at once, each in a process of its own: every variant on a split, then the best on test.

    search = Search(sets, out, command, num_processes=12, seconds=540)
    search.run()

A run writes its figures when it is done, and goes on from its last checkpoint when it is asked for again: so a search
that was cut off keeps all that is done, and the same command goes on. A set's best variant is judged on test as soon as
all its variants are done, or from `choose_after` on, the best of those that are.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

POLL_SECONDS = 0.2
SECONDS_TO_SAVE = 5.0
"""What a run that is ended may take to write its last step down."""
LOWER_IS_BETTER = {"loss", "perplexity"}


@dataclass(frozen=True)
class Work:
    """One run: a set's variant, on the split or on test."""

    name: str
    variant: str
    on_split: bool

    @property
    def label(self) -> str:
        return f"{self.name}.{self.variant}" if self.on_split else self.name

    def figures(self, out: Path) -> Path:
        """Where its figures are written once it is done."""
        return out / "split" / f"{self.label}.json" if self.on_split else out / f"{self.name}.json"

    def run(self, out: Path) -> Path:
        """Its run folder."""
        return out / "runs" / f"{self.label}{'-split' if self.on_split else ''}"


@dataclass(frozen=True)
class Choice:
    """A set and its variants, the longest first."""

    name: str
    variants: tuple[str, ...]

    def best(self, out: Path) -> str | None:
        """The variant that did best on the split, of those that are done; None where none is. One alone needs none."""
        if len(self.variants) == 1:
            return self.variants[0]
        done = [(variant, self._score(out, variant)) for variant in self.variants]
        scored = [(score, variant) for variant, score in done if score is not None]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None  # of equals the first

    def _score(self, out: Path, variant: str) -> float | None:
        path = Work(self.name, variant, on_split=True).figures(out)
        if not path.exists():
            return None
        figures = json.loads(path.read_text(encoding="utf-8"))
        value = float(figures["tuned"]["value"])
        return -value if figures["metric"] in LOWER_IS_BETTER else value


@dataclass
class Search:
    """Runs `choices` on one machine.

    Attributes:
        choices: The sets; those named first begin first.
        out: Where figures, runs and logs go.
        command: What a work's process is started with.
        num_processes: Most at once.
        seconds: After so many all are ended; None to run until all is done.
        choose_after: After so many no further variant begins, those under way are ended, and test is judged with the
            best that is there.
        say: Hears of every beginning and end.
    """

    choices: Sequence[Choice]
    out: Path
    command: Callable[[Work], list[str]]
    num_processes: int
    seconds: float | None = None
    choose_after: float | None = None
    say: Callable[[str], None] = print
    _running: dict[Work, tuple[subprocess.Popen[bytes], float]] = field(default_factory=dict)
    _failed: set[Work] = field(default_factory=set)
    _began: float = 0.0

    def run(self) -> list[Work]:
        """Do all that there is time for.

        Returns:
            The works whose process failed; its words are in OUT/logs.
        """
        self._began = time.monotonic()
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        (self.out / "split").mkdir(exist_ok=True)
        try:
            while not self._is_over():
                self._reap()
                if self._chooses_now():
                    self._end([work for work in self._running if work.on_split])
                waiting = self._waiting()
                while waiting and len(self._running) < self.num_processes:
                    self._start(waiting.pop(0))
                if not self._running:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            self._end(list(self._running))
        return sorted(self._failed, key=lambda work: work.label)

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _is_over(self) -> bool:
        return self.seconds is not None and self._elapsed >= self.seconds

    def _chooses_now(self) -> bool:
        return self.choose_after is not None and self._elapsed >= self.choose_after

    def _waiting(self) -> list[Work]:
        """What may begin now: test before splits, for it is what the search is for; every set's first variant before
        any second, so that each has one when the time is over."""
        tests, splits = [], list[tuple[int, Work]]()
        for choice in self.choices:
            variants = choice.variants if len(choice.variants) > 1 else ()
            works = [Work(choice.name, variant, on_split=True) for variant in variants]
            open_works = [work for work in works if not self._is_settled(work)]
            if open_works and not self._chooses_now():
                splits += [(works.index(work), work) for work in open_works if work not in self._running]
            elif (best := choice.best(self.out)) is not None:
                tests.append(Work(choice.name, best, on_split=False))
        tests = [work for work in tests if not self._is_settled(work) and work not in self._running]
        return tests + [work for _, work in sorted(splits, key=lambda ranked: ranked[0])]

    def _is_settled(self, work: Work) -> bool:
        return work in self._failed or work.figures(self.out).exists()

    def _start(self, work: Work) -> None:
        self.say(f"{self._elapsed:5.0f} s  begins  {work.label} {'' if work.on_split else f'on test: {work.variant}'}")
        with (self.out / "logs" / f"{work.label}.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(work), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._running[work] = (process, time.monotonic())

    def _reap(self) -> None:
        for work, (process, began) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[work]
            took = time.monotonic() - began
            if process.returncode == 0 and work.figures(self.out).exists():
                self.say(f"{self._elapsed:5.0f} s  done    {work.label} in {took:.0f} s: {self._told(work)}")
                continue
            self._failed.add(work)
            self.say(f"{self._elapsed:5.0f} s  FAILED  {work.label} after {took:.0f} s: see logs/{work.label}.log")

    def _told(self, work: Work) -> str:
        figures: dict[str, Any] = json.loads(work.figures(self.out).read_text(encoding="utf-8"))
        base = f"{figures['base']['value']:.4g}" if figures["base"] else "-"
        return f"{figures['metric']} {base} -> {figures['tuned']['value']:.4g}"

    def _end(self, works: Sequence[Work]) -> None:
        """End processes with all that they have started; a training writes its last step down before."""
        processes = {work: self._running.pop(work)[0] for work in works}
        started = [child for process in processes.values() for child in _descendants(process)]
        for process in processes.values():
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for work, process in processes.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
            self.say(f"{self._elapsed:5.0f} s  ended   {work.label}")
        for child in started:  # sessions of their own, which would outlive the process that began them
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
