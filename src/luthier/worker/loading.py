"""From a recipe, a run or an adapter to a base in memory, with its renderer and slots."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from luthier.base.adapter_files import MULTILABEL
from luthier.base.catalogue import find
from luthier.base.fetch import resolve
from luthier.base.folder import read_json, weight_files
from luthier.base.load import Base, load_base
from luthier.base.model import load_model
from luthier.base.own import OwnBase
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.checkpoints.peft_names import HEAD
from luthier.data.prepare import PreparedData, prepare
from luthier.data.store import ReferencedStore
from luthier.data.template import Renderer
from luthier.distributed.zero import WEIGHTS_STAGE
from luthier.engine.pack import BASE_SLOT
from luthier.engine.scoring import reference_margins
from luthier.errors import RecipeError, RunError
from luthier.extras import require_bitsandbytes, require_for_scoring
from luthier.methods.config import bank_spec
from luthier.methods.exclusive.layer import load_own
from luthier.methods.peft.layer import read_peft
from luthier.recipe import DataConfig, Recipe
from luthier.tasks.registry import head_of, task_for
from luthier.tasks.task import Task
from luthier.types import AdapterSpec, ExclusiveSpec, HeadKind
from luthier.worker.budget import JudgingBudget
from luthier.worker.judge import Judge
from luthier.worker.progress import Progress
from luthier.worker.run_folder import RunFolder
from luthier.worker.start import adapter_folder


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
        RecipeError: for a device that is not here, a quantized base without bitsandbytes, or a task whose scores need
            packages that are not here.
    """
    require_for_scoring(recipe.task.type, task_for(recipe.task).needs)
    quantization = recipe.method.quantization
    if quantization is not None:
        require_bitsandbytes(f"method: {recipe.method.type}")
    return placed_on(recipe, device_of(recipe), resolve(recipe.base, say))


def device_of(recipe: Recipe) -> str:
    """The device that the recipe means on this machine.

    Raises:
        RecipeError: for one that is not here.
    """
    device = recipe.compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"compute.device is {device}, and torch sees no CUDA device", fix="set it to cpu or auto")
    number = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and number >= torch.cuda.device_count():
        raise RecipeError(
            f"compute.device is {device}, and torch sees {torch.cuda.device_count()} CUDA devices",
            f"a number below {torch.cuda.device_count()}",
        )
    return device


def placed_on(recipe: Recipe, device: str, folder: Path) -> Placement:
    """Where the recipe's base, or what there is of it in `folder`, is held on a device that need not be here."""
    return Placement(folder, device, dtype_on(recipe, device), recipe.method.quantization)


def dtype_on(recipe: Recipe, device: str) -> str:
    """The base's precision on a device."""
    if recipe.train.dtype != "auto":
        return recipe.train.dtype
    return "bfloat16" if device.startswith("cuda") else "float32"


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


def load_placed(placement: Placement, threads: int | None = None, zero: int = 0) -> Base:
    """Load the base where `placement` says.

    Args:
        zero: The stage by which a job on it will be shared out: DeepSpeed knows autograd's gradients alone, and at
            stage 3 no weight is there but in its own layer's forward.
    """
    set_threads(placement, threads)
    base = load_base(
        placement.folder,
        device=placement.device,
        dtype=placement.dtype,
        quantization=placement.quantization,
        use_reference=zero >= WEIGHTS_STAGE,
        wants_fast_body=False if zero else None,
    )
    base.head_is_plain = base.head_is_plain and zero < WEIGHTS_STAGE
    return base


def load_own_placed(
    placement: Placement, spec: ExclusiveSpec, seed: int, threads: int | None = None, zero: int = 0
) -> OwnBase:
    """Load a base for one exclusive job; `zero` as in `load_placed`, errors as `methods.exclusive.layer.load_own`."""
    set_threads(placement, threads)
    base = load_own(
        placement.folder,
        spec,
        seed=seed,
        device=placement.device,
        dtype=placement.dtype,
        has_masters=zero == 0,
    )
    base.head_is_plain = base.head_is_plain and zero < WEIGHTS_STAGE
    return base


def set_threads(placement: Placement, threads: int | None) -> None:
    """Let torch use so many threads on a CPU; None takes all that this process may use."""
    if placement.device == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def public_name(base: str) -> str:
    """What an adapter's files call the base: its Hub id where it has one, so that it loads anywhere."""
    entry = find(base)
    return entry.hub_id if entry is not None else base


def adapter_spec(recipe: Recipe, renderer: Renderer, task: Task) -> AdapterSpec:
    """The recipe's method as the engine reads it, with the head that its task asks for."""
    tokens = tuple(renderer.token_id(token) for token in recipe.method.new_tokens)
    return replace(bank_spec(recipe.method), new_tokens=tokens, **head_fields(task))


def head_fields(task: Task) -> dict[str, Any]:
    """The fields of a spec that say which head a task asks for; its classes are settled."""
    kind = head_of(task)
    return {} if kind is None else {"num_classes": len(task.outputs), "head": kind}


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
class Tuned:
    """A run's result in memory.

    Attributes:
        base: What it runs on: the resident base, a base with peft's layers, or the trained model itself.
        slot: Its slot there, or `BASE_SLOT` for a model that is itself the result.
        base_slot: Under which slot `base` gives what the model was before training; None where that is another model.
        renderer: Tokenizer and chat template, as in training.
    """

    base: Base
    slot: int
    base_slot: int | None
    renderer: Renderer


def load_tuned(run: RunFolder, recipe: Recipe, placement: Placement) -> Tuned:
    """Load what a run has made, whatever its method.

    Raises:
        RunError: when it has made nothing yet.
    """
    folder = run.tuned(recipe)
    if not folder.exists():
        kind = "model" if folder == run.model else "adapter"
        raise RunError(f"{run.path} has no {kind} yet", fix="let it train, or go on with --resume")
    renderer = Renderer.load(folder)
    if folder == run.model:
        base = load_placed(replace(placement, folder=folder), recipe.compute.threads)
        return Tuned(base, classifier_slot(base, folder), None, renderer)
    if recipe.method.runs == "exclusive":
        set_threads(placement, recipe.compute.threads)
        model = load_model(placement.folder, device=placement.device, dtype=placement.dtype)
        peft_base = read_peft(model, placement.folder, folder)
        # A head has no counterpart in the base: the judge makes an untrained one on a base of its own.
        base_slot = BASE_SLOT if peft_base.slot.head is None else None
        return Tuned(peft_base, peft_base.slot.index, base_slot, renderer)
    base = load_placed(placement, recipe.compute.threads)
    slot = slot_from_adapter(base, folder)
    base_slot = BASE_SLOT
    if slot.head is not None:
        base_slot = base.bank.add(replace(slot.spec, targets=()), recipe.train.seed).index
    return Tuned(base, slot.index, base_slot, renderer)


def classifier_slot(base: Base, folder: Path) -> int:
    """A whole model that classifies keeps its head beside its body; a language model needs no slot."""
    tensors = _head_tensors(folder)
    if not tensors:
        return BASE_SLOT
    kind: HeadKind = "token" if "bias" in tensors else "sequence"
    if read_json(folder / "config.json").get("problem_type") == MULTILABEL:
        kind = "multilabel"
    slot = base.bank.add(AdapterSpec(targets=(), num_classes=tensors["weight"].shape[0], head=kind), seed=0)
    assert slot.head is not None
    with torch.no_grad():
        for name, parameter in slot.head.named_parameters():
            parameter.copy_(tensors[name])
    return slot.index


def _head_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A classifier's "weight" and, for tags, "bias"; empty for a language model."""
    tensors = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in (name for name in file.keys() if name.startswith(f"{HEAD}.")):  # noqa: SIM118 (no mapping)
                tensors[name.removeprefix(f"{HEAD}.")] = file.get_tensor(name)
    return tensors


def _with_reference(data: PreparedData, tuned: Tuned, recipe: Recipe, placement: Placement) -> PreparedData:
    """The held-out pairs with what their reference makes of them, which is loaded where it is not at hand."""
    assert data.validation is not None
    base, slot = tuned.base, BASE_SLOT
    if recipe.start_from is None:
        base = base if tuned.base_slot is not None else load_placed(placement, recipe.compute.threads)
    elif recipe.method.runs == "bank":
        slot = slot_from_adapter(base, adapter_folder(recipe.start_from)).index
    else:
        model = load_model(placement.folder, device=placement.device, dtype=placement.dtype)
        start = read_peft(model, placement.folder, adapter_folder(recipe.start_from))
        base, slot = start, start.slot.index
    return replace(data, validation=ReferencedStore(data.validation, reference_margins(base, data.validation, slot)))


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A finished run, ready to be judged.

    Attributes:
        judge: On the model that is the result.
        slot, base_slot: As in `Tuned`.
        judge_of_base: On the base itself, where that is another model; loads it.
        base_is_reference: Whether preferences were held to the base, rather than to an adapter that training began at.
    """

    judge: Judge
    slot: int
    base_slot: int | None
    judge_of_base: Callable[[], Judge]
    base_is_reference: bool


def load_run(run: str | Path, *, data: Path | None, rows: int | None, progress: Progress) -> LoadedRun:
    """Load a run's result, and the rows to judge on.

    Raises:
        RunError: when the run has made nothing yet.
        DataError: when `data` cannot be judged on.
    """
    folder = RunFolder.open(run)
    recipe = folder.recipe()
    progress.stage("Loading the base")
    placement = placement_of(recipe, progress.note)
    tuned = load_tuned(folder, recipe, placement)
    progress.stage("Reading the held-out rows")
    config = recipe.data if data is None else recipe.data.model_copy(update={"validation": str(data)})
    prepared = prepare_data(recipe, tuned.renderer, folder.path / "data", config)
    if prepared.validation is None or prepared.validation_records is None:
        raise RunError(f"{run} held no rows out", fix="name a file to judge on with --data")
    num_rows = len(prepared.validation_records)
    if prepared.task.objective == "preference":
        prepared = _with_reference(prepared, tuned, recipe, placement)
    chosen = min(num_rows, rows) if rows is not None else num_rows
    generates = recipe.evaluation.generate or prepared.task.chooses
    budget = JudgingBudget(chosen, chosen if generates else 0)

    def judge_on(base: Base) -> Judge:
        return Judge(
            base,
            tuned.renderer,
            prepared,
            budget,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            seed=recipe.train.seed,
            on_rows=lambda what, done, total: progress.evaluation(str(run), what, done, total),
        )

    def judge_of_base() -> Judge:
        base = load_placed(placement, recipe.compute.threads)
        head = head_fields(prepared.task)
        if head:
            base.bank.add(AdapterSpec(targets=(), **head), recipe.train.seed)
        return judge_on(base)

    return LoadedRun(judge_on(tuned.base), tuned.slot, tuned.base_slot, judge_of_base, recipe.start_from is None)
