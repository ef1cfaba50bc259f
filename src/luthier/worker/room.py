"""Whether a worker's base fits where the worker would hold it, before any of its weights is read."""

from __future__ import annotations

from dataclasses import replace

import torch

from luthier.base.fetch import tokenizer_folder
from luthier.base.outline import outline
from luthier.engine.memory import MARGIN, available_bytes, total_bytes
from luthier.errors import MemoryShortError
from luthier.recipe import Recipe
from luthier.registry.seam import Room
from luthier.worker.foresight import held_by
from luthier.worker.loading import device_of, placed_on
from luthier.worker.plan import CONTEXT_BYTES
from luthier.worker.progress import gib
from luthier.worker.worker_options import WorkerOptions


def room_for(options: WorkerOptions) -> Room:
    """What the base takes in the dtype or quantization in which it would be held, and what there is for it.

    Of the base its config alone is read. A tuned model in its place is as large.

    Raises:
        ModelError: when the base cannot be found.
    """
    recipe = Recipe.model_validate({"base": options.source, "data": {"train": "-"}})
    folder = tokenizer_folder(options.source, lambda sentence: None)
    placement = replace(placed_on(recipe, device_of(recipe), folder), quantization=options.quantization or None)
    held, device = held_by(placement, outline(folder)), torch.device(placement.device)
    # On a CPU this process has taken its part already.
    process = 0 if device.type == "cpu" else CONTEXT_BYTES
    return Room(held.weights + held.dense + process, available_bytes(device), total_bytes(device))


def check_room(room: Room, options: WorkerOptions) -> None:
    """Refuse to hold a base for which there is too little memory, or too little beyond it.

    Raises:
        MemoryShortError: with all the sizes.
    """
    if room.base + options.need_bytes > room.free:
        beyond = f", and who waits for it needs {gib(options.need_bytes)} beyond it" if options.need_bytes else ""
        raise MemoryShortError(
            f"{options.held_base} takes {gib(room.base)}{beyond}; {gib(room.free)} of {gib(room.total)} are free here",
            "a machine with as much free memory",
            "free some, start the worker elsewhere, or choose a smaller base, or qlora, which holds it in 4 bits",
        )


def most_for_jobs(room: Room, free_bytes: int) -> int:
    """The most that a worker could ever give a job beyond its base.

    Args:
        free_bytes: What is free once the base is loaded.
    """
    return max(int(room.total * MARGIN) - room.base, free_bytes)
