"""What a run's progress becomes on a terminal, in a log, and when quiet."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from luthier.cli.progress import BarProgress, LineProgress, QuietProgress, choose_progress
from luthier.worker.progress import Progress


def _console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=160, color_system=None), stream


def _run(progress: Progress, num_steps: int = 50) -> None:
    progress.stage("Loading the base")
    progress.facts("What is trained", [("method", "lora, rank 16"), ("trainable", "4,884,480 of 139,399,488")])
    progress.evaluation("first", "base, loss", 0, 8)
    progress.evaluation("first", "base, loss", 8, 8)
    progress.start("first", num_steps)
    for step in range(1, num_steps + 1):
        progress.step("first", step, 2.0 / step, 178.0, 5e-4)
    progress.note("the micro-batch shrank to 512 tokens", "warning")
    progress.note("a remark")
    progress.finish("first", "done in 3 min")
    progress.close()


def test_lines_are_few_and_name_loss_speed_and_time_left() -> None:
    console, stream = _console(terminal=False)
    ticks = iter(range(1000))
    _run(LineProgress(console, clock=lambda: float(next(ticks))))
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if "first: step" in line]
    assert 10 <= len(steps) <= 11
    assert steps[0].startswith("first: step 1/50, loss 2.0000, 178 tokens/s, learning rate 5.00e-04, ")
    assert steps[0].endswith(" left")
    assert steps[-1].startswith("first: step 50/50")
    assert steps[-1].endswith("0 s left")
    assert sum("judging base, loss on 8 rows" in line for line in lines) == 1
    assert "warning: the micro-batch shrank to 512 tokens" in lines
    assert lines[0] == "Loading the base"
    assert lines[-1] == "first: done in 3 min"


def test_time_left_after_a_resume_counts_only_steps_of_this_process() -> None:
    console, stream = _console(terminal=False)
    times = iter([0.0, 2.0])
    progress = LineProgress(console, clock=lambda: next(times))
    progress.start("first", 100)
    progress.step("first", 91, 1.0, 100.0, 1e-4)
    assert stream.getvalue().splitlines()[-1].endswith("18 s left")


def test_each_validation_is_announced_once() -> None:
    console, stream = _console(terminal=False)
    progress = LineProgress(console)
    for done in (1, 2, 3, 1, 2, 3):
        progress.evaluation("first", "validation loss", done, 3)
    assert stream.getvalue().count("judging validation loss") == 2


def test_quiet_shows_warnings_alone() -> None:
    console, stream = _console(terminal=False)
    _run(QuietProgress(console))
    assert stream.getvalue() == "warning: the micro-batch shrank to 512 tokens\n"


def test_bars_show_the_figures_on_a_terminal() -> None:
    console, stream = _console(terminal=True)
    progress = BarProgress(console)
    progress.start("first", 4)
    progress.start("second", 8)
    progress.step("first", 2, 1.25, 178.0, 5e-4)
    progress.evaluation("second", "validation loss", 1, 3)
    progress.close()
    text = stream.getvalue()
    assert "loss 1.250" in text
    assert "178 tokens/s" in text
    assert "2/4" in text
    assert "0/8" in text
    assert "second: judging validation loss" in text


def test_a_bar_fits_into_80_columns() -> None:
    stream = io.StringIO()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=80, color_system=None))
    progress.start("runs/quickstart", 1200)
    progress.step("runs/quickstart", 1100, 1.25, 178.0, 5e-4)
    progress.close()
    text = stream.getvalue()
    assert "1100/1200 loss 1.250  178 tokens/s" in text
    assert text.count("left") >= 2


def test_brackets_in_messages_are_not_markup() -> None:
    for terminal in (False, True):
        console, stream = _console(terminal=terminal)
        progress = choose_progress(console=console)
        progress.stage("reading [bold]data[/bold].jsonl")
        progress.note("fields [prompt]")
        progress.close()
        assert "[bold]data[/bold]" in stream.getvalue()
        assert "[prompt]" in stream.getvalue()


def test_the_whole_run_passes_on_a_terminal() -> None:
    console, stream = _console(terminal=True)
    _run(BarProgress(console))
    assert "first: done in 3 min" in stream.getvalue()


@pytest.mark.parametrize(
    ("quiet", "terminal", "kind"),
    [(True, True, QuietProgress), (False, True, BarProgress), (False, False, LineProgress)],
)
def test_the_watcher_fits_the_output(quiet: bool, terminal: bool, kind: type) -> None:
    console, _ = _console(terminal=terminal)
    assert type(choose_progress(quiet=quiet, console=console)) is kind


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    _run(choose_progress())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Loading the base" in captured.err


def test_the_silent_watcher_needs_no_rich() -> None:
    import subprocess

    code = "import sys; import luthier.worker.progress; assert 'rich' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
