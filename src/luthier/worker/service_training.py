"""What the process of an exclusive job of the service does: its order, and the training of the job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.engine.engine import Engine
from luthier.recipe import Recipe
from luthier.registry.seam import Claim, ClaimedJob
from luthier.worker.loading import load_own_placed, placement_of
from luthier.worker.memory import settle_memory
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
