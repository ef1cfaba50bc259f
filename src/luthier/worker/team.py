"""The processes that train recipes together, from the place of one: who goes first, and what each takes of the machine.

Rank 0 alone writes the run folder, its checkpoints and reports, speaks, and judges; the others train with it and follow
(`worker/following.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from luthier.engine.ranks import ALONE, Ranks, wait_for_all
from luthier.errors import RecipeError
from luthier.recipe import Recipe
from luthier.worker.launch.place import BY_ITSELF, RankPlace
from luthier.worker.loading import Placement
from luthier.worker.progress import Level, Progress, SilentProgress

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Team:
    """A place, and the seam to the others."""

    place: RankPlace = BY_ITSELF
    ranks: Ranks = ALONE

    @property
    def is_first(self) -> bool:
        return self.place.is_first

    def in_turn(self, act: Callable[[], Result]) -> Result:
        """Let the first do something, then the others at once: what it fetched or wrote, they find."""
        if self.is_first:
            result = act()
            wait_for_all(self.ranks)
            return result
        wait_for_all(self.ranks)
        return act()

    def placed(self, placement: Placement) -> Placement:
        """Where this process holds the base."""
        return replace(placement, device=device_at(placement.device, self.place))

    def threads(self, wish: int | None) -> int | None:
        """CPU threads of this process; None for all that there are."""
        if wish is not None or self.place.local_size == 1:
            return wish
        return max(1, len(os.sched_getaffinity(0)) // self.place.local_size)


ONE = Team()


class RankProgress(SilentProgress):
    """What another rank than the first says: warnings alone, with its number."""

    def __init__(self, progress: Progress, rank: int) -> None:
        self._progress, self._rank = progress, rank

    def note(self, message: str, level: Level = "info") -> None:
        if level == "warning":
            self._progress.note(f"rank {self._rank}: {message}", level)


def num_devices(recipes: Sequence[Recipe]) -> int:
    """How many processes the recipes ask for.

    Raises:
        RecipeError: when they do not agree.
    """
    wishes = {recipe.compute.devices for recipe in recipes}
    if len(wishes) > 1:
        raise RecipeError(
            f"recipes that train together ask for different compute.devices: {', '.join(map(str, wishes))}",
            "the same number for all",
            "set it for all of them with --devices",
        )
    (wish,) = wishes
    if wish != "auto":
        return wish
    return torch.cuda.device_count() or 1 if recipes[0].compute.device != "cpu" else 1


def check_together(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes that cannot share several processes.

    Raises:
        RecipeError: for a method that owns its base, beside other recipes.
    """
    exclusive = [recipe for recipe in recipes if recipe.method.runs == "exclusive"]
    if exclusive and len(recipes) > 1:
        raise RecipeError(
            f"{exclusive[0].output} owns its base ({exclusive[0].method.type}), and over several processes such a "
            "recipe trains alone",
            "one recipe, or several whose methods share a base",
            "train it in a `luthier train` of its own",
        )


def device_at(device: str, place: RankPlace) -> str:
    """The device of one of several processes: a GPU each, or the CPU that they share.

    Raises:
        RecipeError: for one GPU's name, or more processes on a machine than it has GPUs.
    """
    if place.size == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise RecipeError(
            f"compute.device is {device}, and {place.size} processes train",
            "cuda, of which each process takes a GPU of its own, or cpu",
            "set compute.device: cuda, and choose GPUs with CUDA_VISIBLE_DEVICES",
        )
    if place.local_size > torch.cuda.device_count():
        raise RecipeError(
            f"{place.local_size} processes are to train on this machine, and torch sees "
            f"{torch.cuda.device_count()} CUDA devices",
            "a GPU for each",
            "lower compute.devices, or set compute.device: cpu",
        )
    return f"cuda:{place.local_rank}"
