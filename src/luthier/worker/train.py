"""Train one recipe, or several together on one base: the whole way from recipes to judged models.

A method that must own its base runs the same way in a process of its own (`children.py`), through `train_exclusive`.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence

import torch

from luthier.base.load import Base
from luthier.engine.engine import DEFAULT_BUDGET_TOKENS, Engine
from luthier.engine.memory import MemoryPlan, available_bytes, fit_micro_batches, plan_memory, recompute_few
from luthier.errors import MemoryShortError, RecipeError
from luthier.recipe import Recipe
from luthier.worker.children import Children
from luthier.worker.interrupts import interrupts
from luthier.worker.loading import Placement, check_optimizer, load_own_placed, load_placed, placement_of
from luthier.worker.method_fit import check_bank_method, check_exclusive_method
from luthier.worker.need import predicted_need
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.result import RunResult
from luthier.worker.run import Run

__all__ = ["RunResult", "train"]

POLL_SECONDS = 0.05
"""Between two looks at the children once nothing trains here."""


def train(recipes: Sequence[Recipe], *, resume: bool = False, progress: Progress | None = None) -> list[RunResult]:
    """Train recipes and judge the models: those of the bank together, each exclusive one in a process of its own.

    Args:
        recipes: At least one, each with an output folder of its own; those of the bank with the same base, dtype and
            device.
        resume: Go on from each run's last checkpoint; what is done already is returned as it is.
        progress: Hears of it.

    Returns:
        Results in the order of the recipes.

    Raises:
        RecipeError, DataError, ModelError, RunError, StorageError: for what a user can mend, before anything is lost.
        KeyboardInterrupt: after Ctrl-C, once every run is saved.
    """
    progress = progress or SilentProgress()
    _check_outputs(recipes)
    shared = [recipe for recipe in recipes if recipe.method.runs == "bank"]
    exclusive = [recipe for recipe in recipes if recipe.method.runs == "exclusive"]
    if not exclusive:
        return train_together(shared, resume=resume, progress=progress)
    children = Children([(r, _need(r, progress)) for r in exclusive], resume=resume, progress=progress)
    try:
        if shared:
            results = train_together(shared, resume=resume, progress=progress, children=children)
        else:
            results = []
            _attend(children)
    except BaseException:
        children.stop()
        raise
    if len(recipes) == 1 and children.errors:
        raise children.errors[0]
    found = children.results | {recipe.output: result for recipe, result in zip(shared, results, strict=True)}
    return [found[recipe.output] for recipe in recipes]


def train_together(
    recipes: Sequence[Recipe], *, resume: bool, progress: Progress, children: Children | None = None
) -> list[RunResult]:
    """Train recipes of the bank on one resident base, while children train beside it; errors as `train`."""
    placement = _common_placement(recipes, progress)
    for recipe in recipes:
        check_bank_method(recipe, placement.folder)
    runs = [Run.begin(recipe, placement.folder, progress, resume=resume) for recipe in recipes]
    kept = [result for run in runs if (result := run.kept_result()) is not None]
    if len(kept) == len(runs):
        progress.note("nothing is left to do: " + ("this run is" if len(runs) == 1 else "these runs are") + " done")
        _attend(children)
        return kept
    progress.stage("Loading the base")
    base = load_placed(placement, max((r.compute.threads or 0 for r in recipes), default=0) or None)
    return _train_on(base, runs, progress, children)


def train_here(recipe: Recipe, *, resume: bool, progress: Progress) -> RunResult:
    """Train one recipe of any method in this process, once it has been checked; errors as `train`."""
    if recipe.method.runs == "bank":
        return train_together([recipe], resume=resume, progress=progress)[0]
    _need(recipe, progress)
    return train_exclusive(recipe, resume=resume, progress=progress)


def train_exclusive(recipe: Recipe, *, resume: bool, progress: Progress) -> RunResult:
    """Train one exclusive recipe in this process, on a base of its own; errors as `train`."""
    placement = placement_of(recipe, progress.note)
    run = Run.begin(recipe, placement.folder, progress, resume=resume)
    if (kept := run.kept_result()) is not None:
        return kept
    progress.stage(f"Loading a base for {recipe.output}")
    base = load_own_placed(placement, run.exclusive_spec(), recipe.train.seed, recipe.compute.threads)
    return _train_on(base, [run], progress)[0]


def _train_on(base: Base, runs: list[Run], progress: Progress, children: Children | None = None) -> list[RunResult]:
    if base.packing_problem:
        progress.note(f"this base runs padded, which is slower: {base.packing_problem}", "warning")
    engine = Engine(base)
    for run in runs:
        run.folder.set_state("training")
        engine.add(run.admit(base))
    plan = _settle_memory(engine, runs, progress)
    if children is not None:
        children.admit(plan.available - plan.needed, beside_others=True)
    for run in runs:
        run.plan_judging()
    progress.stage("Judging the base")
    for run in runs:
        run.judge_base()
    with interrupts() as asked:
        _loop(engine, runs, progress, asked, children)
    progress.stage("Judging the tuned model" + ("s" if len(runs) > 1 else ""))
    results = [run.finish(peak_memory_bytes(base.device), device_name(base)) for run in runs]
    _attend(children)
    return results


def _loop(engine: Engine, runs: list[Run], progress: Progress, asked: list[int], children: Children | None) -> None:
    by_name = {run.name: run for run in runs}
    for run in runs:
        if run.job.is_active:
            progress.start(run.name, run.job.total_steps)
    while engine.has_work:
        if asked:
            for run in runs:
                run.interrupt()
            raise KeyboardInterrupt
        for report in engine.step():
            by_name[report.job].on_step(report)
        for run in runs:
            if run.job.state == "failed" and not run.stopped_because:
                run.stopped_because = run.job.problem
                progress.note(f"{run.name} stopped: {run.job.problem}", "warning")
        if children is not None:
            children.poll()


def _attend(children: Children | None) -> None:
    """Nothing trains here any more: watch the children, if there are any, until the last has ended."""
    with interrupts() as asked:
        while children is not None and children.has_work:
            if asked:
                raise KeyboardInterrupt
            children.poll()
            children.admit(available_bytes(torch.device("cpu")), beside_others=False)
            time.sleep(POLL_SECONDS)


def _need(recipe: Recipe, progress: Progress) -> int:
    """Refuse what cannot work, before anything is loaded, and predict the memory of what can."""
    placement = placement_of(recipe, progress.note)
    return predicted_need(recipe, placement, check_exclusive_method(recipe, placement.folder))


def _check_outputs(recipes: Sequence[Recipe]) -> None:
    if not recipes:
        raise RecipeError("there is no recipe to train", "at least one")
    outputs = [os.path.realpath(recipe.output) for recipe in recipes]
    if len(set(outputs)) < len(outputs):
        raise RecipeError(f"two recipes write to {max(outputs, key=outputs.count)}", "an `output` of its own for each")


def _common_placement(recipes: Sequence[Recipe], progress: Progress) -> Placement:
    placements = [placement_of(recipe, progress.note) for recipe in recipes]
    for recipe, placement in zip(recipes, placements, strict=True):
        check_optimizer(recipe, placement.device)
        if placement != placements[0]:
            raise RecipeError(
                f"recipes train together on one base, and {recipe.output} asks for {placement}",
                f"{placements[0]}, as the first",
                "train it by itself, in a `luthier train` of its own",
            )
    return placements[0]


def _settle_memory(engine: Engine, runs: list[Run], progress: Progress) -> MemoryPlan:
    """Predict memory, turn on recomputation or shrink micro-batches until it fits, and say what came out.

    Raises:
        MemoryShortError: when even one sequence at a time would not fit.
    """
    base, jobs = engine.base, [run.job for run in runs]
    modes = {run.recipe.train.gradient_checkpointing for run in runs}
    base.set_checkpointing("on" in modes)
    plan = plan_memory(base, jobs, engine.budget_tokens)
    if not plan.fits and "on" not in modes and "off" not in modes:
        num_layers = recompute_few(base, jobs, engine.budget_tokens)
        share = f" in {num_layers} of {base.num_layers} blocks" if num_layers < base.num_layers else ""
        progress.note(f"memory is short: activations are computed again in the backward{share}", "warning")
    engine.budget_tokens = fit_micro_batches(base, jobs, DEFAULT_BUDGET_TOKENS)
    plan = plan_memory(base, jobs, engine.budget_tokens)
    if not plan.fits:
        raise MemoryShortError(
            f"the jobs need {_gib(plan.needed)} beyond the base, and {_gib(plan.available)} are free",
            fix="lower train.max_length or method.rank, set train.gradient_checkpointing: on, or free some memory",
        )
    if engine.budget_tokens < DEFAULT_BUDGET_TOKENS:
        progress.note(f"a forward holds at most {engine.budget_tokens:,} tokens, so that it fits in memory")
    progress.facts("memory", _memory_rows(plan, base))
    return plan


def _memory_rows(plan: MemoryPlan, base: Base) -> list[tuple[str, str]]:
    return [
        ("base", f"{_gib(plan.base)} as {_held(base)}, loaded"),
        ("adapters, gradients, optimizer", _gib(plan.adapters + plan.gradients + plan.optimizer)),
        ("activations", f"{_gib(plan.activations)} at most"),
        ("still to be taken", f"{_gib(plan.needed)} of {_gib(plan.available)} free"),
    ]


def _held(base: Base) -> str:
    dtype = str(base.dtype).removeprefix("torch.")
    return f"{base.quantization.upper()} ({dtype} besides)" if base.quantization else dtype


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(base: Base) -> str:
    if base.device.type == "cuda":
        return torch.cuda.get_device_name(base.device)
    return f"CPU, {torch.get_num_threads()} threads"
