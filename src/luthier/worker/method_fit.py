"""Do a recipe's method and its base go together? Told from the base's config, before any weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luthier.base.folder import read_json
from luthier.base.outline import outline
from luthier.data.encoders import check_encoder_task, is_encoder
from luthier.engine.targets import check_layers
from luthier.errors import RecipeError
from luthier.methods.config import bank_spec, exclusive_spec
from luthier.methods.exclusive.layer import Outline, check
from luthier.methods.peft.fields import check_fields
from luthier.recipe import Recipe
from luthier.tasks.registry import head_of, task_for
from luthier.worker.peft_values import check_values


def check_method(recipe: Recipe, folder: Path) -> None:
    """Refuse a method that the base cannot take, as a training would.

    Args:
        folder: The base's, of which config.json is read.

    Raises:
        RecipeError: for a target that the base has not, a rank above a layer's, or a method or task that it cannot
            take.
        ModelError: when the folder describes no causal language model or encoder.
    """
    if recipe.method.runs == "bank":
        check_bank_method(recipe, folder)
    else:
        check_exclusive_method(recipe, folder)


def check_bank_method(recipe: Recipe, folder: Path) -> None:
    """Hold a method of the bank against the base's layers; errors as `check_method`."""
    check_for_encoder(recipe, folder)
    if recipe.start_from is not None:  # an existing adapter brings its own layers
        return
    shape = outline(folder)
    check_layers(bank_spec(recipe.method), shape.layers, shape.output_name)


def check_exclusive_method(recipe: Recipe, folder: Path) -> Outline:
    """Put an exclusive method into the base without its weights; errors as `check_method`."""
    check_for_encoder(recipe, folder)
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
    kind = head_of(task_for(recipe.task))
    if kind is not None:  # how many classes there are shows with the data; that there are any, now
        spec = replace(spec, num_classes=2, head=kind)
    return check(folder, spec)


def check_for_encoder(recipe: Recipe, folder: Path) -> None:
    """Refuse what an encoder does not learn or cannot take; says nothing of other bases.

    Args:
        folder: The base's, of which config.json is read.

    Raises:
        RecipeError: naming the recipe's field.
    """
    config = read_json(folder / "config.json")
    if not is_encoder(config):
        return
    name = str(config["model_type"])
    check_encoder_task(recipe.task.type, task_for(recipe.task).objective, name)
    if recipe.data.replay is not None:
        raise RecipeError(
            f"data.replay mixes in text to write, and the base is an encoder ({name})",
            "a base that writes",
            "leave data.replay out",
        )
    if recipe.method.runs != "bank" or recipe.method.quantization is not None:
        raise RecipeError(
            f"method: {recipe.method.type}, and the base is an encoder ({name})",
            "one of lora, dora and ia3 on an encoder",
            "set `method: lora`, which trains the head in full beside its layers",
        )
    if recipe.compute.zero:
        raise RecipeError(
            f"compute.zero is {recipe.compute.zero}, and the base is an encoder ({name})",
            "0: encoders are small, and a bank of adapters has little to share out",
            "leave compute.zero out",
        )
