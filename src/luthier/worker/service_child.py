"""The process of one exclusive job of the service: `python -m luthier.worker.service_child`.

The order comes as one JSON line on standard input; what happens goes to standard output, one JSON object a line, and
the worker that started the process records it (`child_jobs.py`):

{"verb": "begin", "total_steps": 20, "num_rows": 40, "num_tokens": 900}
{"verb": "step", "step": {...}}                              a StepRecord
{"verb": "checkpoint", "files": {...}, "checkpoint": {...}}  SavedFiles and a CheckpointRecord
{"verb": "result", "files": {...}, "result": {...}}          SavedFiles and a JobResult
{"verb": "failed", "message": "..."}                         the training cannot go on
{"verb": "error", ...}                                       as in `messages.py`: the job cannot begin
{"verb": "saved"}                                            asked to stop, after the last checkpoint

SIGTERM saves and stops. The end of standard input means that the worker is gone, and what is saved here with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.engine.engine import Engine, is_out_of_memory
from luthier.errors import LuthierError
from luthier.recipe import Recipe
from luthier.registry.seam import Claim, ClaimedJob
from luthier.worker.loading import load_own_placed, placement_of
from luthier.worker.memory import settle_memory
from luthier.worker.messages import SendingProgress, error_message, own_messages
from luthier.worker.progress import SilentProgress
from luthier.worker.recorded_run import JobFiles, RecordedRun
from luthier.worker.train import device_name, peak_memory_bytes

Send = Callable[..., None]


class StoppedError(Exception):
    """Asked to stop while nothing was in hand that a checkpoint does not hold."""


@dataclass(frozen=True)
class Order:
    """What the process is started for.

    Attributes:
        base_folder: Where the base's weights and tokenizer lie.
        score_tokens: Most tokens in one forward while scoring.
        threads: CPU threads; None takes all cores.
    """

    files: JobFiles
    base_folder: Path
    score_tokens: int
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "claimed": asdict(self.files.claimed),
            "folder": str(self.files.folder),
            "recipe": self.files.recipe.model_dump(mode="json"),
            "base_folder": str(self.base_folder),
            "score_tokens": self.score_tokens,
            "threads": self.threads,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Order:
        given = values["claimed"]
        lists = {"claim": Claim(**given["claim"]), "checkpoints": tuple(given["checkpoints"])}
        claimed = ClaimedJob(**{**given, **lists})
        files = JobFiles(claimed, Path(values["folder"]), Recipe.model_validate(values["recipe"]))
        return cls(files, Path(values["base_folder"]), values["score_tokens"], values["threads"])


def work(order: Order, send: Send, is_stopping: threading.Event) -> None:
    """Train the job from its last checkpoint to its end, or to where it is told to stop.

    Raises:
        LuthierError: where the job cannot begin.
        StoppedError: where it was told to stop before it began, or after its last step.
    """

    def between() -> None:
        if is_stopping.is_set():
            raise StoppedError

    run = RecordedRun.begin(order.files, order.base_folder)
    recipe = order.files.recipe
    base = load_own_placed(placement_of(recipe), run.run.exclusive_spec(), recipe.train.seed, order.threads)
    engine = Engine(base)
    engine.add(run.admit(base, order.score_tokens, between))
    settle_memory(engine, [run.run], SilentProgress())
    run.run.plan_judging()
    send(verb="begin", total_steps=run.job.total_steps, num_rows=run.num_rows, num_tokens=run.num_tokens)
    run.run.judge_base()
    # From here a step in hand is finished, with the validation that belongs to it.
    run.run.between = None
    while engine.has_work:
        if is_stopping.is_set():
            run.save()
            _send_checkpoint(run, send)
            raise StoppedError
        for report in engine.step():
            send(verb="step", step=asdict(run.on_step(report)))
            _send_checkpoint(run, send)
    if run.job.state == "failed":
        send(verb="failed", message=run.public(run.job.problem))
        return
    between()
    files, result = run.take_result(peak_memory_bytes(base.device), device_name(base))
    send(verb="result", files=files.to_dict(), result=asdict(result))


def _send_checkpoint(run: RecordedRun, send: Send) -> None:
    if (taken := run.take_checkpoint()) is not None:
        files, checkpoint = taken
        send(verb="checkpoint", files=files.to_dict(), checkpoint=asdict(checkpoint))


def main() -> int:
    """Exit codes: 0 done, refused, or stopped; 1 a defect."""
    send = SendingProgress(own_messages()).send
    order = Order.from_dict(json.loads(sys.stdin.readline()))
    is_stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_stopping.set())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(order, send, is_stopping)
    except StoppedError:
        send(verb="saved")
    except LuthierError as error:
        send(**error_message(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        send(verb="failed", message="one sequence alone does not fit into the memory; lower train.max_length")
    return 0


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(130)


if __name__ == "__main__":
    try:
        code = main()
    except BrokenPipeError:  # orphaned: there is nobody to tell
        code = 130
    sys.exit(code)
