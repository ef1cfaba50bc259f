"""From a recipe, a run or an adapter to a base in memory, with its renderer and slots."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from luthier.base.catalogue import find
from luthier.base.fetch import resolve
from luthier.base.load import Base, load_base
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.data.prepare import PreparedData, prepare
from luthier.data.template import Renderer
from luthier.engine.pack import BASE_SLOT
from luthier.engine.slot import Slot
from luthier.errors import RecipeError, RunError
from luthier.extras import require_bitsandbytes
from luthier.recipe import DataConfig, Recipe
from luthier.tasks.registry import task_for
from luthier.types import AdapterSpec
from luthier.worker.budget import JudgingBudget
from luthier.worker.judge import Judge
from luthier.worker.progress import Progress
from luthier.worker.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a base is held: what jobs must have in common to share it."""

    folder: Path
    device: str
    dtype: str
    quantization: str | None = None

    def __str__(self) -> str:
        held = f"{self.quantization.upper()}, computed in {self.dtype}," if self.quantization else self.dtype
        return f"{self.folder.name} in {held} on {self.device}"


def placement_of(recipe: Recipe, say: Callable[[str], None] = lambda text: None) -> Placement:
    """Fetch the recipe's base if need be, and settle device and dtype.

    Raises:
        RecipeError: for a device that is not here, or a quantized base without bitsandbytes.
    """
    quantization = recipe.method.quantization
    if quantization is not None:
        require_bitsandbytes(f"method: {recipe.method.type}")
    device = recipe.compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"compute.device is {device}, and torch sees no CUDA device", fix="set it to cpu or auto")
    dtype = recipe.train.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return Placement(resolve(recipe.base, say), device, dtype, quantization)


def check_optimizer(recipe: Recipe, device: str) -> None:
    """Refuse, before anything is loaded, an optimizer that cannot run on `device`.

    Raises:
        RecipeError: for bitsandbytes' without bitsandbytes, and for paged moments on a CPU.
    """
    name = recipe.train.optimizer
    if name == "adamw":
        return
    require_bitsandbytes(f"train.optimizer: {name}")
    if name.startswith("paged") and not device.startswith("cuda"):
        raise RecipeError(
            f"train.optimizer is {name}, and the job runs on {device}",
            "a CUDA device: paging moves moments from a GPU's memory to the host's, and on a CPU there is only the one",
            f"set train.optimizer: {name.removeprefix('paged_')}",
        )


def load_placed(placement: Placement, threads: int | None = None) -> Base:
    """Load the base where `placement` says."""
    if placement.device == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return load_base(
        placement.folder, device=placement.device, dtype=placement.dtype, quantization=placement.quantization
    )


def public_name(base: str) -> str:
    """What an adapter's files call the base: its Hub id where it has one, so that it loads anywhere."""
    entry = find(base)
    return entry.hub_id if entry is not None else base


def adapter_spec(recipe: Recipe, renderer: Renderer, num_classes: int | None) -> AdapterSpec:
    """The recipe's method as the engine reads it."""
    tokens = tuple(renderer.token_id(token) for token in recipe.method.new_tokens)
    return replace(recipe.method.adapter_spec(), new_tokens=tokens, num_classes=num_classes)


def prepare_data(
    recipe: Recipe,
    renderer: Renderer,
    folder: Path,
    data: DataConfig | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> PreparedData:
    """The recipe's data (or another's), checked, split and rendered under `folder`."""
    return prepare(
        data or recipe.data,
        task_for(recipe.task),
        renderer,
        max_length=recipe.train.max_length,
        truncation=recipe.train.truncation,
        seed=recipe.train.seed,
        folder=folder,
        on_progress=on_progress,
    )


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A finished run, ready to be judged."""

    base: Base
    slot: Slot
    base_slot: int
    judge: Judge


def load_run(run: str | Path, *, data: Path | None, rows: int | None, progress: Progress) -> LoadedRun:
    """Load a run's base and adapter, and the rows to judge on.

    Raises:
        RunError: when the run has no adapter yet.
        DataError: when `data` cannot be judged on.
    """
    folder = RunFolder.open(run)
    if not folder.adapter.exists():
        raise RunError(f"{run} has no adapter yet", fix="let it train, or go on with --resume")
    recipe = folder.recipe()
    progress.stage("Loading the base")
    placement = placement_of(recipe, progress.note)
    base = load_placed(placement, recipe.compute.threads)
    renderer = Renderer.load(folder.adapter)
    progress.stage("Reading the held-out rows")
    config = recipe.data if data is None else recipe.data.model_copy(update={"validation": str(data)})
    prepared = prepare_data(recipe, renderer, folder.path / "data", config)
    if prepared.validation is None or prepared.validation_records is None:
        raise RunError(f"{run} held no rows out", fix="name a file to judge on with --data")
    slot = slot_from_adapter(base, folder.adapter)
    base_slot = BASE_SLOT
    if slot.head is not None:
        base_slot = base.bank.add(replace(slot.spec, targets=()), recipe.train.seed).index
    num_rows = len(prepared.validation_records)
    chosen = min(num_rows, rows) if rows is not None else num_rows
    budget = JudgingBudget(chosen, chosen if recipe.evaluation.generate else 0)
    judge = Judge(
        base,
        renderer,
        prepared,
        budget,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        seed=recipe.train.seed,
        on_rows=lambda what, done, total: progress.evaluation(str(run), what, done, total),
    )
    return LoadedRun(base, slot, base_slot, judge)
