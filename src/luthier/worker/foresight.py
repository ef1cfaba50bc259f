"""What a recipe will take in memory before its base is loaded: for `luthier plan`, and for who is let in beside others.

The sum is `engine/memory.py`'s, and what it is made of is measured on skeletons of one and of two blocks, by the code
that will run. What depends on the vocabulary alone is counted, for large ones are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from luthier.base.folder import read_json
from luthier.base.load import Base
from luthier.base.model import torch_dtype
from luthier.base.outline import Outline, outline
from luthier.base.skeleton import CUT_VOCABULARY, skeleton
from luthier.data.encoders import is_encoder, num_positions
from luthier.engine.job import TrainingJob, total_steps
from luthier.engine.memory import Held, JobCosts, MemoryPlan, largest_micro_batch, measured_costs, plan_of
from luthier.engine.own import OwnSlot
from luthier.engine.slot import Slot
from luthier.methods.config import bank_spec, exclusive_spec
from luthier.methods.exclusive.layer import own_over
from luthier.methods.peft.fields import VIRTUAL_TOKENS
from luthier.ops.nf4 import num_bytes_of
from luthier.recipe import Recipe
from luthier.tasks.registry import head_of, task_for
from luthier.types import AdapterSpec, Example, Examples, ExclusiveSpec
from luthier.worker.loading import Placement


@dataclass(frozen=True, slots=True)
class Foresight:
    """What is known of a run before its base is loaded.

    Attributes:
        memory: The plan; what is `available` in it is left once the base is there.
        num_trained: Parameters that train.
        recomputes: Whether activations are computed again in the backward.
        owns_weights: Whether what trains are the base's own weights.
    """

    memory: MemoryPlan
    num_trained: int
    recomputes: bool
    owns_weights: bool


def foresee(
    recipe: Recipe, placement: Placement, examples: Examples | None, capacity: int, num_classes: int | None = None
) -> Foresight:
    """Predict what the recipe takes where `placement` says, which need not be here.

    Args:
        placement: Its folder needs config.json alone.
        examples: The training data; None to count on batches of the longest examples that the recipe allows.
        capacity: Bytes that the device has for the base and all that comes with it.
        num_classes: Of a classifier, once the data has told.

    Raises:
        RecipeError: when method and base do not go together.
        ModelError: when the folder does not describe a causal language model.
    """
    shape = outline(placement.folder)
    mode = recipe.train.gradient_checkpointing
    found = _foresee(recipe, placement, shape, examples, capacity, num_classes, recomputes=mode == "on")
    if mode == "auto" and not found.memory.fits:
        return _foresee(recipe, placement, shape, examples, capacity, num_classes, recomputes=True)
    return found


def _foresee(
    recipe: Recipe,
    placement: Placement,
    shape: Outline,
    examples: Examples | None,
    capacity: int,
    num_classes: int | None,
    *,
    recomputes: bool,
) -> Foresight:
    spec = _spec(recipe, examples, num_classes)
    # Blocks below the last that train keep nothing for the backward.
    is_last = isinstance(spec, ExclusiveSpec) and spec.method == "last_layers"
    num_blocks = min(spec.num_layers, shape.num_blocks) if is_last else shape.num_blocks  # type: ignore[union-attr]
    given = examples if examples is not None else _longest(recipe, placement.folder)
    measured = [_measure(recipe, placement, shape, spec, given, count, recomputes) for count in (1, 2)]
    (one, tokens, width), (two, _, _) = measured
    costs = JobCosts.of_blocks(one, two, num_blocks)
    owns_weights = isinstance(spec, ExclusiveSpec) and spec.owns_weights
    if owns_weights:
        costs = _with_vocabulary(costs, spec, shape, width)  # type: ignore[arg-type]
    num_trained = costs.adapters // width
    held = held_by(placement, shape, num_trained if owns_weights else 0)
    plan = plan_of(held, [costs], tokens, available=0)
    left = capacity - plan.process - plan.base - plan.adapters
    return Foresight(replace(plan, available=left), num_trained, recomputes, owns_weights)


def _spec(recipe: Recipe, examples: Examples | None, num_classes: int | None) -> AdapterSpec | ExclusiveSpec:
    kind = head_of(task_for(recipe.task))
    head: dict[str, Any] = {}
    if kind is not None:  # the data tells how many classes; a head is small
        head = {"num_classes": num_classes or 2, "head": kind}
    if recipe.method.runs == "exclusive":
        steps = total_steps(len(examples) if examples is not None else recipe.train.batch_size, recipe.train.spec())
        return replace(exclusive_spec(recipe.method), total_steps=steps, **head)
    spec = bank_spec(recipe.method)
    targets = spec.targets if isinstance(spec.targets, str) else tuple(map(_in_every_block, spec.targets))
    # Rows of the vocabulary: any ids serve to count them.
    tokens = tuple(range(len(recipe.method.new_tokens)))
    return replace(spec, targets=targets, new_tokens=tokens, **head)


def _in_every_block(target: str) -> str:
    """A target without its block's number: a skeleton has not all blocks, and to count more than one is on the safe
    side."""
    parts = target.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else target


def _longest(recipe: Recipe, base_folder: Path) -> list[Example]:
    length = recipe.train.max_length
    config = read_json(base_folder / "config.json")
    if is_encoder(config):  # its texts end where its positions do
        length = min(length, num_positions(config) or length)
    num_sides = 2 if task_for(recipe.task).objective == "preference" else 1
    size = num_sides * length
    example = Example(np.zeros(size, dtype=np.int32), np.ones(size, dtype=np.float32))
    return [example] * recipe.train.batch_size


def _measure(
    recipe: Recipe,
    placement: Placement,
    shape: Outline,
    spec: AdapterSpec | ExclusiveSpec,
    examples: Examples,
    num_blocks: int,
    recomputes: bool,
) -> tuple[JobCosts, int, int]:
    """Costs on a skeleton, tokens of the largest micro-batch, and bytes of a trained value."""
    model = skeleton(placement.folder, num_blocks, placement.dtype, keeps_vocabulary=_keeps_vocabulary(spec, shape))
    seed = recipe.train.seed
    base: Base
    slot: Slot | OwnSlot
    if isinstance(spec, ExclusiveSpec):
        given = replace(spec, num_layers=min(spec.num_layers, num_blocks))
        base = own = own_over(model, placement.folder, given, seed=seed)
        slot = own.slot
    else:
        base = Base(model)
        slot = base.bank.add(spec, seed, fresh=False)
    base.set_checkpointing(recomputes)
    job = TrainingJob(recipe.output, slot, examples, recipe.train.spec())
    width = max(p.element_size() for p in slot.parameters().values())
    return measured_costs(base, job, shape.vocabulary_size), largest_micro_batch(job), width


def _keeps_vocabulary(spec: AdapterSpec | ExclusiveSpec, shape: Outline) -> bool:
    """Whether the method reads or trains more of embedding and output layer than is counted."""
    if isinstance(spec, ExclusiveSpec):
        return spec.peft_type in VIRTUAL_TOKENS
    output = (shape.output_name or "").rsplit(".", 1)[-1]
    reaches_output = not isinstance(spec.targets, str) and any(target.endswith(output) for target in spec.targets)
    return bool(spec.modules_to_save or spec.new_tokens) or reaches_output


def _with_vocabulary(costs: JobCosts, spec: ExclusiveSpec, shape: Outline, width: int) -> JobCosts:
    """With the trained rows of embedding and output layer that the skeletons lack."""
    num_missing = (shape.vocabulary_size - min(shape.vocabulary_size, CUT_VOCABULARY)) * shape.hidden_size
    num_matrices = _trained_matrices(spec, shape)
    if num_missing == 0 or num_matrices == 0:
        return costs
    more = num_missing * num_matrices * width
    return replace(
        costs,
        adapters=costs.adapters + more,
        gradients=costs.gradients + more,
        optimizer=costs.optimizer + round(more * costs.optimizer / costs.adapters),
        largest=max(costs.largest, shape.vocabulary_size * shape.hidden_size * width),
    )


def _trained_matrices(spec: ExclusiveSpec, shape: Outline) -> int:
    """How many of embedding and output layer train: a tied pair is one, and a classifier has no output layer."""
    is_untied_output = not shape.is_tied and spec.num_classes is None and shape.output_name is not None
    if spec.method == "full":
        return 1 + is_untied_output
    return int(is_untied_output) if spec.method == "last_layers" else 0


def held_by(placement: Placement, shape: Outline, num_own: int = 0) -> Held:
    """The base as it is held, without those of its `num_own` weights that train in place."""
    itemsize = torch_dtype(placement.dtype).itemsize
    in_place = num_own if itemsize >= 4 else 0  # narrower weights have masters beside them
    weights, dense = (shape.num_parameters - in_place) * itemsize, 0
    if placement.quantization == "nf4":
        sizes = [size for name, size in _sizes(shape) if name != shape.output_name]
        weights += sum(num_bytes_of(size) - size * itemsize for size in sizes)
        dense = max(sizes, default=0) * itemsize
    device = "cuda" if placement.device.startswith("cuda") else placement.device
    return Held(weights, dense, shape.hidden_size, shape.vocabulary_size, device, itemsize)


def _sizes(shape: Outline) -> Sequence[tuple[str, int]]:
    return [(name, num_inputs * num_outputs) for name, (num_inputs, num_outputs) in shape.layers.items()]
