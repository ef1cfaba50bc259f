"""Train one recipe, or several together on one base: the whole way from recipes to judged models.

A method that must own its base runs the same way in a process of its own (`children.py`), through `train_exclusive`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from luthier.base.load import Base
from luthier.base.outline import outline
from luthier.engine.engine import Engine
from luthier.engine.memory import available_bytes
from luthier.engine.targets import check_layers
from luthier.errors import RecipeError
from luthier.methods.config import bank_spec, exclusive_spec
from luthier.methods.exclusive.layer import check
from luthier.methods.peft.fields import check_fields
from luthier.recipe import Recipe
from luthier.worker.children import Children
from luthier.worker.killed import note_end
from luthier.worker.loading import Placement, check_optimizer, load_own_placed, load_placed, placement_of
from luthier.worker.memory import Shrinking, settle_memory
from luthier.worker.peft_values import check_values
from luthier.worker.plan import admission_bytes
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.run import Run, RunResult
from luthier.worker.run_lock import holding

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
    _check_methods(recipes, placement)
    with holding([recipe.output for recipe in recipes]):
        return _train_held(recipes, placement, resume=resume, progress=progress, children=children)


def _train_held(
    recipes: Sequence[Recipe], placement: Placement, *, resume: bool, progress: Progress, children: Children | None
) -> list[RunResult]:
    runs = [Run.begin(recipe, placement.folder, progress, resume=resume) for recipe in recipes]
    kept = [result for run in runs if (result := run.kept_result()) is not None]
    if len(kept) == len(runs):
        progress.note("nothing is left to do: " + ("this run is" if len(runs) == 1 else "these runs are") + " done")
        _attend(children)
        return kept
    progress.stage("Loading the base")
    base = load_placed(placement, max((r.compute.threads or 0 for r in recipes), default=0) or None)
    return _train_on(base, runs, progress, children)


def train_exclusive(recipe: Recipe, *, resume: bool, progress: Progress) -> RunResult:
    """Train one exclusive recipe in this process, on a base of its own; errors as `train`."""
    placement = placement_of(recipe, progress.note)
    with holding([recipe.output]):
        run = Run.begin(recipe, placement.folder, progress, resume=resume)
        if (kept := run.kept_result()) is not None:
            return kept
        progress.stage(f"Loading a base for {recipe.output}")
        base = load_own_placed(placement, run.exclusive_spec(), recipe.train.seed, recipe.compute.threads)
        return _train_on(base, [run], progress)[0]


def _train_on(base: Base, runs: list[Run], progress: Progress, children: Children | None = None) -> list[RunResult]:
    try:
        return _train_noted(base, runs, progress, children)
    except BaseException as error:
        for run in runs:
            note_end(run.folder, error)
        raise


def _train_noted(base: Base, runs: list[Run], progress: Progress, children: Children | None) -> list[RunResult]:
    if base.packing_problem:
        progress.note(f"this base runs padded, which is slower: {base.packing_problem}", "warning")
    engine = Engine(base)
    for run in runs:
        engine.add(run.admit(base))
    plan = settle_memory(engine, runs, progress)
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
    shrinking = Shrinking(engine, runs, progress)
    while engine.has_work:
        if asked:
            for run in runs:
                run.interrupt()
            raise KeyboardInterrupt
        for report in engine.step():
            by_name[report.job].on_step(report)
        shrinking.look()
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
    spec = exclusive_spec(recipe.method)
    if not spec.owns_weights:
        check_fields(spec)
        check_values(spec)
    elif recipe.start_from is not None:
        raise RecipeError(
            f"start_from: {recipe.method.type} trains the base's own weights",
            "the model to go on from as the base",
            f"name it under `base`, as in base: {recipe.start_from}",
        )
    if recipe.task.type == "classification":
        spec = replace(spec, num_classes=2)  # how many there are shows with the data; that there are any, now
    check(placement.folder, spec)
    return admission_bytes(recipe, placement)


def _check_outputs(recipes: Sequence[Recipe]) -> None:
    if not recipes:
        raise RecipeError("there is no recipe to train", "at least one")
    outputs = [os.path.realpath(recipe.output) for recipe in recipes]
    if len(set(outputs)) < len(outputs):
        raise RecipeError(f"two recipes write to {max(outputs, key=outputs.count)}", "an `output` of its own for each")


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Gather Ctrl-C and SIGTERM instead of dying within a step; a second Ctrl-C dies at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _check_methods(recipes: Sequence[Recipe], placement: Placement) -> None:
    """Hold each method against the base's layers before its weights are loaded and its data read.

    Raises:
        RecipeError: for a target that the base has not, or a rank above a layer's.
    """
    shape = outline(placement.folder)
    for recipe in recipes:
        if recipe.start_from is None:  # an existing adapter brings its own layers
            check_layers(bank_spec(recipe.method), shape.layers, shape.output_name)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: what it counts begins with the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def device_name(base: Base) -> str:
    if base.device.type == "cuda":
        return torch.cuda.get_device_name(base.device)
    return f"CPU, {torch.get_num_threads()} threads"
