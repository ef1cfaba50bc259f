"""Loading what a worker of the service holds: a base, a base in NF4, or a tuned model in place of its base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from luthier.base.adapter_files import CONFIG_FILE
from luthier.base.load import Base
from luthier.base.model import load_model
from luthier.data.template import Renderer
from luthier.engine.pack import BASE_SLOT
from luthier.extras import require_bitsandbytes
from luthier.methods.peft.layer import read_peft
from luthier.recipe import Recipe
from luthier.store.blobs import Blobs
from luthier.worker.loading import Placement, classifier_slot, load_placed, placement_of, set_threads
from luthier.worker.worker_options import WorkerOptions


@dataclass(frozen=True, slots=True)
class Resident:
    """What is held.

    Attributes:
        source: What recipes of jobs name as their base.
        folder: Where its weights and tokenizer lie; for peft's layers, where those lie.
        home: Index of the slot that answers a request without an adapter.
    """

    base: Base
    renderer: Renderer
    source: str
    folder: Path
    home: int


def load_resident(options: WorkerOptions, blobs: Blobs) -> Resident:
    """Load it.

    Raises:
        RecipeError, ModelError, StorageError: when it cannot be had.
    """
    placement = placement_of(Recipe.model_validate({"base": options.source, "data": {"train": "-"}}))
    if options.quantization:
        require_bitsandbytes(f"a base in {options.quantization}")
        placement = replace(placement, quantization=options.quantization)
    if not options.weights:
        base = load_placed(placement, options.threads)
        return Resident(base, Renderer.load(placement.folder), options.source, placement.folder, BASE_SLOT)
    folder = options.scratch / "weights"
    blobs.get_folder(options.weights, folder)
    if (folder / CONFIG_FILE).exists():
        return _load_layers(placement, folder, options)
    base = load_placed(replace(placement, folder=folder), options.threads)
    return Resident(base, Renderer.load(folder), str(folder), folder, classifier_slot(base, folder))


def _load_layers(placement: Placement, folder: Path, options: WorkerOptions) -> Resident:
    """A base with layers of peft's in it: it answers, and no job trains on it."""
    set_threads(placement, options.threads)
    model = load_model(placement.folder, device=placement.device, dtype=placement.dtype)
    base = read_peft(model, placement.folder, folder)
    return Resident(base, Renderer.load(folder), options.source, folder, base.slot.index)
