"""`luthier plan` and the admission of a process: a recipe's memory with its data, before its base is there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.base.fetch import tokenizer_folder
from luthier.base.folder import weight_files
from luthier.base.model import torch_dtype
from luthier.base.outline import outline, read_config
from luthier.data.check import train_files
from luthier.data.prepare import PreparedData
from luthier.data.template import Renderer
from luthier.engine.memory import available_bytes
from luthier.engine.sample import MAX_ROWS
from luthier.engine.zero_states import model_states
from luthier.errors import LuthierError, ModelError, RecipeError
from luthier.recipe import Recipe
from luthier.tasks.registry import head_of
from luthier.worker.foresight import Foresight, foresee
from luthier.worker.judge import EXTRA_TOKENS, ROOM_FOR_REPLY
from luthier.worker.loading import Placement, placed_on, prepare_data
from luthier.worker.method_fit import check_for_encoder
from luthier.worker.progress import Progress, SilentProgress

CONTEXT_BYTES = 600 * 10**6
"""What CUDA takes of a GPU for itself, its kernels and its libraries' workspaces."""

MOST_DATA_BYTES = 64 * 2**20
"""An admission reads data files up to this size; past it, it counts on the longest examples."""

_SIZES = {"gb": 10**9, "gib": 2**30, "g": 10**9, "mb": 10**6, "mib": 2**20}


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """What one recipe takes.

    Attributes:
        device: In words.
        foresight: Its training.
        loading, judging: The most that is held while the base is loaded, and while replies are generated.
        capacity: What the device has for all of it.
        knows_data: Whether the lengths are the data's, rather than the longest that the recipe allows.
    """

    recipe: Recipe
    placement: Placement
    device: str
    foresight: Foresight
    loading: int
    judging: int
    capacity: int
    knows_data: bool

    @property
    def peak(self) -> int:
        return max(self.foresight.memory.peak, self.loading, self.judging)

    @property
    def largest_micro_batch_tokens(self) -> int:
        """Tokens in the largest forward that a run would choose there."""
        return self.foresight.memory.tokens_that_fit

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and self.largest_micro_batch_tokens >= self.foresight.memory.tokens

    def bytes_of(self) -> dict[str, int]:
        """The parts of the peak of training, and the other peaks."""
        memory, owns = self.foresight.memory, self.foresight.owns_weights
        return {
            "process": memory.process,
            "weights": memory.base + (memory.adapters if owns else 0),
            "adapter": 0 if owns else memory.adapters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
            "training": memory.peak,
            "loading": self.loading,
            "judging": self.judging,
            "peak": self.peak,
            "available": self.capacity,
        }

    def model_states(self) -> list[dict[str, int]]:
        """Bytes of model states that each of the recipe's processes would hold at ZeRO's stages 0 to 3.

        Empty where the base is quantized, which ZeRO does not train.
        """
        if self.placement.quantization is not None:
            return []
        devices = self.recipe.compute.devices
        num_ranks = devices if isinstance(devices, int) else 1
        itemsize = torch_dtype(self.placement.dtype).itemsize
        num_trained, num_base = self.foresight.num_trained, outline(self.placement.folder).num_parameters
        owns = self.foresight.owns_weights
        found = []
        for stage in range(4):
            # Factors of a method of the bank are float32 beside a base of any width.
            frozen = model_states(num_base - num_trained if owns else num_base, 0, itemsize, stage, num_ranks)
            trained = model_states(0, num_trained, itemsize if owns else 4, stage, num_ranks)
            weights = frozen.weights + trained.weights
            found.append(
                {
                    "stage": stage,
                    "num_ranks": num_ranks,
                    "weights": weights,
                    "gradients": trained.gradients,
                    "optimizer": trained.optimizer,
                    "total": weights + trained.gradients + trained.optimizer,
                }
            )
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.recipe.base,
            "method": self.recipe.method.type,
            "device": self.device,
            "dtype": self.placement.dtype,
            "quantization": self.placement.quantization,
            "num_trained_parameters": self.foresight.num_trained,
            "recomputes_activations": self.foresight.recomputes,
            "micro_batch_tokens": self.foresight.memory.tokens,
            "lengths_from": "data" if self.knows_data else "recipe",
            "bytes": self.bytes_of(),
            "zero": self.model_states(),
            "largest_micro_batch_tokens": self.largest_micro_batch_tokens,
            "fits": self.fits,
        }


def gpu_bytes(size: str) -> int:
    """A GPU's memory as people write it: 24GB, 80GiB.

    Raises:
        RecipeError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", size)
    unit = _SIZES.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        raise RecipeError(f"--gpu {size}", "a size, as in 24GB or 80GiB")
    return int(float(found[1]) * unit)


def plan_recipe(recipe: Recipe, gpu: str | None = None, progress: Progress | None = None) -> RecipePlan:
    """Predict a recipe's memory on this machine's CPU, or on a GPU of a named size that need not be here.

    Of the base its config and tokenizer are read, never its weights.

    Raises:
        RecipeError: when method and base do not go together, or for a size that is none.
        ModelError: when the base cannot be found.
        DataError: for data that is there and does not hold.
    """
    progress = progress or SilentProgress()
    size = gpu_bytes(gpu) if gpu is not None else None
    folder = tokenizer_folder(recipe.base, progress.note)
    check_for_encoder(recipe, folder)
    placement = placed_on(recipe, "cpu" if size is None else "cuda", folder)
    with data_at_hand(recipe, folder) as data:
        return _plan(recipe, placement, data, gpu, size)


def _plan(
    recipe: Recipe, placement: Placement, data: PreparedData | None, gpu: str | None, size: int | None
) -> RecipePlan:
    capacity = size - CONTEXT_BYTES if size is not None else available_bytes(torch.device("cpu"))
    examples = data.train if data is not None else None
    foresight = foresee(recipe, placement, examples, capacity, _num_classes(data))
    memory = foresight.memory
    beside_replies = memory.process + memory.base + memory.adapters + memory.optimizer
    return RecipePlan(
        recipe=recipe,
        placement=placement,
        device=f"a GPU of {gpu}" if gpu is not None else "this machine's CPU",
        foresight=foresight,
        loading=_loading_bytes(placement, foresight),
        judging=beside_replies + _reply_bytes(recipe, placement, data),
        capacity=capacity,
        knows_data=data is not None,
    )


def admission_bytes(recipe: Recipe, placement: Placement) -> int:
    """The peak of a recipe that is to train in a process of its own."""
    folder = placement.folder
    try:
        is_small = sum(Path(file).stat().st_size for file in train_files(recipe.data)) <= MOST_DATA_BYTES
        if is_small:
            with data_at_hand(recipe, folder) as data:
                examples = data.train if data is not None else None
                return foresee(recipe, placement, examples, 2**62, _num_classes(data)).memory.peak
    except (OSError, LuthierError):
        pass  # its own process says what is wrong with its data
    return foresee(recipe, placement, None, 2**62).memory.peak


@contextmanager
def data_at_hand(recipe: Recipe, base_folder: Path) -> Iterator[PreparedData | None]:
    """The recipe's data, rendered for as long as the block runs; None where a training file is not there.

    Raises:
        DataError: for data that is there and does not hold.
    """
    if not all(Path(file).exists() for file in train_files(recipe.data)):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="luthier-plan-") as folder:
        yield prepare_data(recipe, Renderer.load(base_folder, recipe.method.new_tokens), Path(folder))


def _num_classes(data: PreparedData | None) -> int | None:
    if data is None or head_of(data.task) is None:
        return None
    return len(data.task.outputs) or None


def _loading_bytes(placement: Placement, foresight: Foresight) -> int:
    """What is held while weights are read: on a CPU, pages of the file that are not what stays."""
    memory = foresight.memory
    held = memory.process + memory.base + memory.adapters
    if placement.device != "cpu":
        return held
    try:
        file = sum(path.stat().st_size for path in weight_files(placement.folder))
    except ModelError:  # the weights have not been fetched
        return held
    config = read_config(placement.folder)
    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    is_mapped = placement.quantization is None and stored == torch_dtype(placement.dtype)
    return held + (0 if is_mapped else file)


def _reply_bytes(recipe: Recipe, placement: Placement, data: PreparedData | None) -> int:
    """Keys and values of the replies that are generated at a time while judging."""
    if data is None or data.validation is None or not (recipe.evaluation.generate and data.task.generates):
        return 0
    asked = [n for n in (recipe.evaluation.rows, recipe.evaluation.generate_rows) if n is not None]
    rows = min([MAX_ROWS, len(data.validation), *asked])
    longest = int(data.validation.num_tokens.max())
    positions = longest + min(recipe.evaluation.max_new_tokens, int((ROOM_FOR_REPLY - 1) * longest) + EXTRA_TOKENS)
    config = read_config(placement.folder).get_text_config()
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_keys = getattr(config, "num_key_value_heads", None) or num_heads
    size = torch_dtype(placement.dtype).itemsize
    return rows * positions * 2 * config.num_hidden_layers * num_keys * head_size * size
