"""Memory before and while runs train: predicted, made to fit, said, and given way to."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.base.load import Base
from luthier.engine.engine import Engine
from luthier.engine.memory import MemoryPlan, fit_micro_batches, plan_memory, recompute_few
from luthier.engine.ranks import least_of
from luthier.errors import MemoryShortError
from luthier.worker.killed import note_training, tokens_after_kill
from luthier.worker.progress import Progress, gib
from luthier.worker.run import Run


def settle_memory(engine: Engine, runs: Sequence[Run], progress: Progress) -> MemoryPlan:
    """Predict memory, turn on recomputation or shrink micro-batches until it fits, and say what came out.

    Runs that were killed for want of memory go on in halves. Then all of them are noted as training.

    Raises:
        MemoryShortError: when even one sequence at a time would not fit.
    """
    base, jobs = engine.base, [run.job for run in runs]
    _halve_killed(engine, runs, progress)
    modes = {run.recipe.train.gradient_checkpointing for run in runs}
    base.set_checkpointing("on" in modes)
    plan = plan_memory(base, jobs, engine.budget_tokens)
    if not plan.fits and "on" not in modes and "off" not in modes:
        num_layers = recompute_few(base, jobs, engine.budget_tokens)
        share = f" in {num_layers} of {base.num_layers} blocks" if num_layers < base.num_layers else ""
        progress.note(f"memory is short: activations are computed again in the backward{share}", "warning")
    before = engine.budget_tokens
    engine.budget_tokens = fit_micro_batches(base, jobs, before)
    plan = plan_memory(base, jobs, engine.budget_tokens)
    if not plan.fits:
        raise MemoryShortError(
            f"the jobs need {gib(plan.needed)} beyond the base, and {gib(plan.available)} are free",
            fix="lower train.max_length or method.rank, set train.gradient_checkpointing: on, or free some memory",
        )
    if engine.budget_tokens < before:
        progress.note(f"a forward holds at most {engine.budget_tokens:,} tokens, so that it fits in memory")
    progress.facts("memory", _rows(plan, base))
    for run in runs:
        note_training(run.folder, plan.tokens, run.job.total_steps)
    return plan


def settle_micro_batches(engine: Engine) -> None:
    """Where ranks share a job's state, all cut its batches as the one with the least room does."""
    for job in engine.jobs.values():
        if job.optimizer.shares_state:
            job.micro_batch_tokens = least_of(engine.ranks, job.micro_batch_tokens)


def _halve_killed(engine: Engine, runs: Sequence[Run], progress: Progress) -> None:
    for run in runs:
        tokens, sentence = tokens_after_kill(run.folder) if run.resumed else (None, "")
        if sentence:
            progress.note(sentence, "info" if tokens is None else "warning")
        if tokens is not None:
            engine.budget_tokens = min(engine.budget_tokens, tokens)
            run.job.micro_batch_tokens = min(run.job.micro_batch_tokens, tokens)


class Shrinking:
    """Says it once when memory ran out within a step and the engine went on in smaller parts."""

    def __init__(self, engine: Engine, runs: Sequence[Run], progress: Progress) -> None:
        self._engine, self._runs, self._progress = engine, runs, progress
        self._budget = engine.budget_tokens
        self._sizes = {run.name: run.job.micro_batch_tokens for run in runs}

    def look(self) -> None:
        """Call between steps."""
        if self._engine.budget_tokens < self._budget:
            self._budget = self._engine.budget_tokens
            self._progress.note(
                f"memory ran out: jobs share forwards of at most {self._budget:,} tokens from now on", "warning"
            )
        for run in self._runs:
            if run.job.micro_batch_tokens < self._sizes[run.name]:
                self._sizes[run.name] = run.job.micro_batch_tokens
                self._progress.note(
                    f"memory ran out: {run.name} goes on with at most {run.job.micro_batch_tokens:,} tokens in a "
                    "forward, and the same optimizer batch",
                    "warning",
                )


def _rows(plan: MemoryPlan, base: Base) -> list[tuple[str, str]]:
    rows = [
        ("base", f"{gib(plan.base)} as {_held(base)}, loaded"),
        ("adapters, gradients, optimizer", gib(plan.adapters + plan.gradients + plan.optimizer)),
        ("activations", f"{gib(plan.activations)} at most"),
        ("still to be taken", f"{gib(plan.needed)} of {gib(plan.available)} free"),
    ]
    return [*rows, ("at its peak", f"{gib(plan.peak)}, the process included" if plan.process else gib(plan.peak))]


def _held(base: Base) -> str:
    dtype = str(base.dtype).removeprefix("torch.")
    return f"{base.quantization.upper()} ({dtype} besides)" if base.quantization else dtype
