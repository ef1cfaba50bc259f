"""How the command line shows a run: bars on a terminal, a few lines elsewhere, warnings alone when quiet.

All of it goes to standard error, so that standard output holds results and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from luthier.cli.console import err, facts_table
from luthier.evaluate.summary import format_seconds
from luthier.worker.progress import Level, Progress, SilentProgress

LINES_PER_JOB = 10
"""Lines that a job's steps become where there is no terminal."""


def choose_progress(*, quiet: bool = False, console: Console | None = None) -> Progress:
    """The watcher that fits: warnings alone if `quiet`, bars on a terminal, else a few lines.

    Args:
        quiet: Show nothing but warnings.
        console: Where to write; standard error if None.
    """
    console = console or err()
    if quiet:
        return QuietProgress(console)
    return BarProgress(console) if console.is_terminal else LineProgress(console)


class QuietProgress(SilentProgress):
    """Shows warnings and nothing else."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, message: str, level: Level = "info") -> None:
        if level == "warning":
            _print_note(self._console, message, level)


@dataclass
class _JobLines:
    total_steps: int
    started_at: float
    first_step: int | None = None
    next_share: int = 1


class LineProgress:
    """Writes a line a stage and about ten lines a job; fit for log files.

    Args:
        console: Where to write.
        clock: Seconds that only grow, for the time left.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._jobs: dict[str, _JobLines] = {}
        self._evaluations: dict[tuple[str, str], int] = {}

    def stage(self, message: str) -> None:
        self._line(message)

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        self._line(f"{title}:")
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._line(f"  {name:<{width}}  {value}")

    def start(self, job: str, total_steps: int) -> None:
        self._jobs[job] = _JobLines(total_steps=total_steps, started_at=self._clock())
        self._line(f"{job}: {total_steps} steps")

    def step(self, job: str, step: int, loss: float, tokens_per_second: float, learning_rate: float) -> None:
        lines = self._jobs[job]
        first = lines.first_step is None
        if lines.first_step is None:
            lines.first_step = step
        share = step * LINES_PER_JOB // max(lines.total_steps, 1)
        if not first and share < lines.next_share:
            return
        lines.next_share = share + 1
        num_seen = step - lines.first_step + 1
        left = (self._clock() - lines.started_at) / num_seen * max(lines.total_steps - step, 0)
        self._line(
            f"{job}: step {step}/{lines.total_steps}, loss {loss:.4f}, {tokens_per_second:.0f} tokens/s, "
            f"learning rate {learning_rate:.2e}, {format_seconds(left)} left"
        )

    def evaluation(self, job: str, what: str, done: int, total: int) -> None:
        # A line when it begins; a validation loss comes again and again, so a lower count means a new evaluation.
        before = self._evaluations.get((job, what))
        self._evaluations[job, what] = done
        if before is None or done < before:
            self._line(f"{job}: judging {what} on {total} rows")

    def note(self, message: str, level: Level = "info") -> None:
        _print_note(self._console, message, level)

    def finish(self, job: str, summary: str) -> None:
        self._line(f"{job}: {summary}")

    def close(self) -> None:
        pass

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class BarProgress:
    """A bar a job, with its loss, tokens per second and time left, and a bar while an evaluation runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            # Narrow enough that a line with a short job's name fits into 80 columns.
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            # Steps on a CPU take seconds: the speed needs a long window.
            speed_estimate_period=300,
            transient=True,
        )
        self._jobs: dict[str, TaskID] = {}
        self._stepped: set[str] = set()
        self._evaluations: dict[str, tuple[str, TaskID]] = {}
        self._live = False

    def stage(self, message: str) -> None:
        self._console.print(Text(message, style="bold"))

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        self._console.print(facts_table(title, rows))

    def start(self, job: str, total_steps: int) -> None:
        self._go_live()
        self._jobs[job] = self._bars.add_task(job, total=total_steps, figures="")

    def step(self, job: str, step: int, loss: float, tokens_per_second: float, learning_rate: float) -> None:
        self._end_evaluation(job)
        figures = f"loss {loss:.3f}  {tokens_per_second:.0f} tokens/s"
        if job not in self._stepped:
            # Steps done before a resume took no time here: left in, they would make the time left far too short.
            self._stepped.add(job)
            self._bars.reset(self._jobs[job], completed=step - 1)
        self._bars.update(self._jobs[job], completed=step, figures=figures)

    def evaluation(self, job: str, what: str, done: int, total: int) -> None:
        self._go_live()
        if job in self._evaluations and self._evaluations[job][0] != what:
            self._end_evaluation(job)
        if job not in self._evaluations:
            self._evaluations[job] = (what, self._bars.add_task(f"{job}: judging {what}", total=total, figures=""))
        self._bars.update(self._evaluations[job][1], completed=done, total=total)
        if done >= total:
            self._end_evaluation(job)

    def note(self, message: str, level: Level = "info") -> None:
        _print_note(self._console, message, level)

    def finish(self, job: str, summary: str) -> None:
        self._end_evaluation(job)
        if job in self._jobs:
            self._bars.remove_task(self._jobs.pop(job))
        self._console.print(Text.assemble((f"{job}: ", "bold"), summary))

    def close(self) -> None:
        if self._live:
            self._bars.stop()
            self._live = False

    def _go_live(self) -> None:
        if not self._live:
            self._bars.start()
            self._live = True

    def _end_evaluation(self, job: str) -> None:
        if job in self._evaluations:
            self._bars.remove_task(self._evaluations.pop(job)[1])


def _print_note(console: Console, message: str, level: Level) -> None:
    label = Text("warning: ", style="bold yellow") if level == "warning" else Text("")
    console.print(label + Text(message), soft_wrap=True)
