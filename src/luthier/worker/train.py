"""Train one recipe, or several together on one base: the whole way from recipes to judged models.

A method that must own its base runs the same way in a process of its own (`children.py`), through `train_exclusive`.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from luthier.base.load import Base
from luthier.distributed.torch_ranks import connected
from luthier.engine.engine import Engine
from luthier.engine.memory import available_to_others
from luthier.engine.ranks import any_of, wait_for_all
from luthier.errors import ProcessLostError, RecipeError
from luthier.recipe import Recipe
from luthier.worker.children import Children
from luthier.worker.following import FollowingRun
from luthier.worker.interrupts import interrupts
from luthier.worker.killed import mark_killed, note_end
from luthier.worker.launch.crew import run_crew
from luthier.worker.launch.launcher import Launcher
from luthier.worker.launch.local import LocalLauncher
from luthier.worker.launch.place import RankPlace, place_of_process
from luthier.worker.loading import Placement, check_optimizer, device_of, load_own_placed, load_placed, placement_of
from luthier.worker.memory import Shrinking, settle_memory, settle_micro_batches
from luthier.worker.method_fit import check_bank_method, check_exclusive_method, check_method
from luthier.worker.plan import admission_bytes
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.result import RunResult
from luthier.worker.run import Run
from luthier.worker.run_folder import RunFolder
from luthier.worker.run_lock import holding
from luthier.worker.team import ONE, RankProgress, Team, check_together, device_at, num_devices
from luthier.worker.zero import check_zero

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
        ProcessLostError: where one of several processes was killed, or is gone.
        KeyboardInterrupt: after Ctrl-C, once every run is saved.
    """
    progress = progress or SilentProgress()
    _check_outputs(recipes)
    place = place_of_process()
    if place is not None:
        return train_ranked(recipes, place, resume=resume, progress=progress)
    if _needs_ranks(recipes):
        return train_launched(recipes, LocalLauncher(), resume=resume, progress=progress)
    shared = [recipe for recipe in recipes if recipe.method.runs == "bank"]
    exclusive = [recipe for recipe in recipes if recipe.method.runs == "exclusive"]
    if not exclusive:
        return train_together(shared, resume=resume, progress=progress)
    waiting = [(recipe, _need(recipe, progress)) for recipe in exclusive]
    children = Children(waiting, resume=resume, progress=progress, device=device_of(exclusive[0]))
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
    if any(recipe.output not in found for recipe in recipes):
        raise KeyboardInterrupt  # a child was asked to stop by somebody else, and has saved
    return [found[recipe.output] for recipe in recipes]


def train_launched(
    recipes: Sequence[Recipe], launcher: Launcher, *, resume: bool, progress: Progress
) -> list[RunResult]:
    """Train recipes over several processes that `launcher` starts; errors as `train`."""
    size = num_devices(recipes)
    check_together(recipes)
    check_zero(recipes)
    # Before anything is started, so that the base is fetched once and a refusal is said once.
    placement = _common_placement(recipes, progress)
    device_at(placement.device, RankPlace(0, size, 0, size))
    for recipe in recipes:
        check_method(recipe, placement.folder)
    order = {"recipes": [recipe.model_dump(mode="json") for recipe in recipes], "resume": resume}
    try:
        results = run_crew(launcher, order, size, progress)
    except ProcessLostError as error:
        for folder in (RunFolder(Path(recipe.output)) for recipe in recipes):
            if folder.has_state and not folder.is_unused:
                mark_killed(folder, error.found)
        raise
    return [RunResult(Path(recipe.output), **values) for recipe, values in zip(recipes, results, strict=True)]


def train_ranked(recipes: Sequence[Recipe], place: RankPlace, *, resume: bool, progress: Progress) -> list[RunResult]:
    """Train recipes as one of several processes; errors as `train`.

    Returns:
        Results in the order of the recipes, without scores where another process judges.
    """
    check_together(recipes)
    check_zero(recipes)
    wish = recipes[0].compute.devices
    if place.is_first and wish not in (1, "auto", place.size):
        progress.note(f"compute.devices is {wish}, and {place.size} processes were started: so many train", "warning")
    device = torch.device(device_at(device_of(recipes[0]), place))
    with connected(place.rank, place.size, place.rendezvous, device) as ranks:
        team = Team(place, ranks)
        heard = progress if place.is_first else RankProgress(progress, place.rank)
        if recipes[0].method.runs == "exclusive":
            return [train_exclusive(recipes[0], resume=resume, progress=heard, team=team)]
        return train_together(recipes, resume=resume, progress=heard, team=team)


def train_together(
    recipes: Sequence[Recipe], *, resume: bool, progress: Progress, children: Children | None = None, team: Team = ONE
) -> list[RunResult]:
    """Train recipes of the bank on one resident base, while children train beside it; errors as `train`."""
    placement = team.placed(team.in_turn(lambda: _common_placement(recipes, progress)))
    for recipe in recipes:
        check_bank_method(recipe, placement.folder)
    with _holding(recipes, team):
        return _train_held(recipes, placement, resume=resume, progress=progress, children=children, team=team)


def _holding(recipes: Sequence[Recipe], team: Team) -> AbstractContextManager[None]:
    return holding([recipe.output for recipe in recipes]) if team.is_first else nullcontext()


def _begin(recipes: Sequence[Recipe], folder: Path, *, resume: bool, progress: Progress, team: Team) -> list[Run]:
    """The recipes' runs, as this process has them."""
    kind = Run if team.is_first else FollowingRun
    runs = team.in_turn(lambda: [kind.begin(recipe, folder, progress, resume=resume) for recipe in recipes])
    wait_for_all(team.ranks)  # from here on the first may write what the others have read
    for run in runs:
        run.ranks = team.ranks
    return runs


def _train_held(
    recipes: Sequence[Recipe],
    placement: Placement,
    *,
    resume: bool,
    progress: Progress,
    children: Children | None,
    team: Team,
) -> list[RunResult]:
    runs = _begin(recipes, placement.folder, resume=resume, progress=progress, team=team)
    kept = [result for run in runs if (result := run.kept_result()) is not None]
    if len(kept) == len(runs):
        progress.note("nothing is left to do: " + ("this run is" if len(runs) == 1 else "these runs are") + " done")
        _attend(children)
        return kept
    progress.stage("Loading the base")
    threads = team.threads(max((r.compute.threads or 0 for r in recipes), default=0) or None)
    base = load_placed(placement, threads, recipes[0].compute.zero)
    return _train_on(base, runs, progress, team, children)


def _needs_ranks(recipes: Sequence[Recipe]) -> bool:
    """Whether the recipes train in processes with ranks; ZeRO does even in one."""
    return num_devices(recipes) > 1 or any(recipe.compute.zero for recipe in recipes)


def train_here(recipe: Recipe, *, resume: bool, progress: Progress) -> RunResult:
    """Train one recipe of any method in this process, or in several of its own; errors as `train`."""
    if _needs_ranks([recipe]):
        return train_launched([recipe], LocalLauncher(), resume=resume, progress=progress)[0]
    if recipe.method.runs == "bank":
        return train_together([recipe], resume=resume, progress=progress)[0]
    _need(recipe, progress)
    return train_exclusive(recipe, resume=resume, progress=progress)


def train_exclusive(recipe: Recipe, *, resume: bool, progress: Progress, team: Team = ONE) -> RunResult:
    """Train one exclusive recipe in this process, on a base of its own; errors as `train`."""
    placement = team.placed(team.in_turn(lambda: placement_of(recipe, progress.note)))
    if team is not ONE:
        check_optimizer(recipe, placement.device)
        check_exclusive_method(recipe, placement.folder)
    with _holding([recipe], team):
        (run,) = _begin([recipe], placement.folder, resume=resume, progress=progress, team=team)
        if (kept := run.kept_result()) is not None:
            return kept
        progress.stage(f"Loading a base for {recipe.output}")
        threads = team.threads(recipe.compute.threads)
        base = load_own_placed(placement, run.exclusive_spec(), recipe.train.seed, threads, recipe.compute.zero)
        return _train_on(base, [run], progress, team)[0]


def _train_on(
    base: Base, runs: list[Run], progress: Progress, team: Team, children: Children | None = None
) -> list[RunResult]:
    try:
        return _train_noted(base, runs, progress, team, children)
    except BaseException as error:
        for run in runs:
            note_end(run.folder, error)
        raise


def _train_noted(
    base: Base, runs: list[Run], progress: Progress, team: Team, children: Children | None
) -> list[RunResult]:
    if base.packing_problem and team.is_first:
        progress.note(f"this base runs padded, which is slower: {base.packing_problem}", "warning")
    if base.device.type == "cpu":
        base.num_sharing = team.place.local_size
    engine = Engine(base, ranks=team.ranks)
    for run in runs:
        engine.add(run.admit(base))
    for run in runs:
        run.check_replicas()
    plan = settle_memory(engine, runs, progress)
    settle_micro_batches(engine)
    if children is not None:
        children.admit(plan.available - plan.needed, beside_others=True)
    for run in runs:
        run.plan_judging()
    progress.stage("Judging the base")
    for run in runs:
        run.judge_base()
    for run in runs:
        run.job.optimizer.shard()
    with interrupts() as asked:
        _loop(engine, runs, progress, asked, children)
    for run in runs:
        run.job.optimizer.gather()
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
        if any_of(engine.ranks, bool(asked)):
            for run in runs:
                run.interrupt()
            raise KeyboardInterrupt
        for report in engine.step():
            by_name[report.job].on_step(report)
        shrinking.look()
        for run in runs:
            if run.job.state == "failed" and not run.stopped_because:
                run.stopped_because = run.job.problem
                run.progress.note(f"{run.name} stopped: {run.job.problem}", "warning")
        if children is not None:
            children.poll()


def _attend(children: Children | None) -> None:
    """Nothing trains here any more: watch the children, if there are any, until the last has ended."""
    with interrupts() as asked:
        while children is not None and children.has_work:
            if asked:
                raise KeyboardInterrupt
            children.poll()
            children.admit(available_to_others(torch.device(children.device)), beside_others=False)
            time.sleep(POLL_SECONDS)


def _need(recipe: Recipe, progress: Progress) -> int:
    """Refuse what cannot work, before anything is loaded, and predict the memory of what can."""
    placement = placement_of(recipe, progress.note)
    check_exclusive_method(recipe, placement.folder)
    return admission_bytes(recipe, placement)


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
