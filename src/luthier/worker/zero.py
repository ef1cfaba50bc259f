"""Which recipes train under ZeRO, and what their jobs then step by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from luthier.base.load import Base
from luthier.compute import ZERO_TABLE, MethodKind
from luthier.deepspeed_file import check_deepspeed_file, passed_on, read_deepspeed_file, unused_in
from luthier.distributed.zero import WEIGHTS_STAGE, ZeroOptimizer, check_config
from luthier.distributed.zero_config import zero_config
from luthier.engine.optimizer import JobOptimizer
from luthier.engine.own import OwnSlot
from luthier.engine.ranks import Ranks
from luthier.engine.slot import Slot
from luthier.errors import RecipeError
from luthier.extras import require_deepspeed
from luthier.recipe import Recipe
from luthier.tasks.registry import head_of, task_for
from luthier.worker.loading import device_of, dtype_on

_BESIDE_OTHERS = "DeepSpeed steps all that trains in a process at once, and jobs of a bank step by themselves"
_HEAD = "the head is read outside a forward of its own, and there each process holds a part of it"
_IN_FULL = "modules or tokens that train whole beside the factors have not been shown to train so"
_UNSCALED = "gradients held so need a scaled loss, which there is not; bfloat16 needs none"
_OPTIMIZER = "DeepSpeed shares out torch's AdamW alone"

_KEPT_WHOLE = "stage3_param_persistence_threshold"

_OWN_WEIGHTS = ("full", "last_layers", "bias")
_BANK: dict[str, MethodKind] = {"lora": "lora", "dora": "dora", "ia3": "ia3"}


def kind_of(recipe: Recipe) -> MethodKind:
    """The row of `ZERO_TABLE` that a recipe's method belongs to."""
    method = recipe.method
    if method.type in _OWN_WEIGHTS:
        return "full, last_layers, bias"
    if method.quantization is not None:
        return "over NF4"
    if method.runs == "bank":
        return _BANK[method.type]
    is_adalora = method.type == "adalora" or getattr(method, "name", "").casefold() == "adalora"
    return "adalora" if is_adalora else "other methods of peft"


def check_zero(recipes: Sequence[Recipe]) -> None:
    """Refuse what ZeRO cannot train, before anything is loaded.

    Raises:
        RecipeError: with the reason; also where DeepSpeed is missing.
    """
    stages = {recipe.compute.zero for recipe in recipes}
    if stages == {0}:
        return
    require_deepspeed(f"compute.zero: {max(stages)}")
    for recipe in recipes:
        problem = _BESIDE_OTHERS if len(recipes) > 1 else _problem(recipe)
        if problem:
            raise RecipeError(
                f"{recipe.output}: compute.zero is {recipe.compute.zero}, and {problem}",
                "a recipe that trains alone, with a method of the table in docs/reference/recipe.md",
                "set compute.zero: 0 for plain data parallelism, or choose another method",
            )
        _check_file(recipe)


def _check_file(recipe: Recipe) -> None:
    file = recipe.compute.deepspeed
    if file is None:
        return
    values = recipe.model_dump()
    values["train"]["dtype"] = dtype_on(recipe, device_of(recipe))
    check_deepspeed_file(read_deepspeed_file(file), values, file)


def _problem(recipe: Recipe) -> str:
    method, stage = recipe.method, recipe.compute.zero
    if problem := ZERO_TABLE[kind_of(recipe), stage]:
        return f"method is {method.type}: {problem}"
    if method.type in _OWN_WEIGHTS and recipe.train.dtype == "float16":
        return f"train.dtype is float16: {_UNSCALED}"
    if recipe.train.optimizer != "adamw":
        return f"train.optimizer is {recipe.train.optimizer}: {_OPTIMIZER}"
    if stage < WEIGHTS_STAGE:
        return ""
    if head_of(task_for(recipe.task)) is not None:
        return f"the task has a head: {_HEAD}"
    if getattr(method, "modules_to_save", None) or method.new_tokens:
        return f"method trains modules or tokens in full: {_IN_FULL}"
    return ""


def _check_kept_whole(zero: Mapping[str, Any], largest: int, file: str) -> None:
    found = zero.get(_KEPT_WHOLE, largest)
    if found < largest:
        raise RecipeError(
            f"{file}: zero_optimization.{_KEPT_WHOLE} is {found:,}, and the largest factor has {largest:,} values",
            "no less, for the factors stay whole on every rank",
            'raise it, or set it to "auto"',
        )


def optimizer_maker(
    recipe: Recipe, base: Base, slot: Slot | OwnSlot, ranks: Ranks, say: Callable[[str], None] = lambda text: None
) -> Callable[..., JobOptimizer]:
    """What makes the optimizer of the recipe's job; `say` hears what has no effect.

    Raises:
        RecipeError: for what can only be seen once the base is loaded.
    """
    stage = recipe.compute.zero
    if not stage:
        return JobOptimizer
    parameters = list(slot.parameters().values())
    if len({p.dtype for p in parameters}) > 1:
        raise RecipeError(
            f"compute.zero is {stage}, and what trains is held in several types: a head is float32, the base is not",
            "one type, for DeepSpeed holds all that it steps in one piece",
            "set train.dtype: float32",
        )
    # A slot of the bank is no part of the model: what trains stays whole, and the base is shared out.
    largest = max((p.numel() for p in parameters), default=0) if isinstance(slot, Slot) else 0
    file = recipe.compute.deepspeed
    values = read_deepspeed_file(file) if file is not None else {}
    own = passed_on(values)
    if unused := unused_in(values):
        say(f"{file}: without effect here: {', '.join(unused)}")
    config = zero_config(
        stage,
        recipe.compute.offload,
        recipe.train.max_grad_norm,
        is_bfloat16=all(p.dtype == torch.bfloat16 for p in parameters),
        largest_kept_whole=largest,
        own=own,
    )
    if file is not None:
        check_config(config, base.device, file)
        _check_kept_whole(config["zero_optimization"], largest, file)

    def make(named: dict, spec: object, total_steps: int, ratios: dict, hooks: object, flat: object) -> JobOptimizer:
        exact = slot.exact if isinstance(slot, OwnSlot) else {}
        return ZeroOptimizer(named, spec, total_steps, ratios, base, ranks, config, exact)  # type: ignore[arg-type]

    return make
