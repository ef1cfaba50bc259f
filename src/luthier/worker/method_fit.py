"""Do a recipe's method and its base go together? Told from the base's config, before any weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luthier.base.outline import outline
from luthier.engine.targets import check_layers
from luthier.errors import RecipeError
from luthier.methods.config import bank_spec, exclusive_spec
from luthier.methods.exclusive.layer import Outline, check
from luthier.methods.peft.fields import check_fields
from luthier.recipe import Recipe
from luthier.worker.peft_values import check_values


def check_method(recipe: Recipe, folder: Path) -> None:
    """Refuse a method that the base cannot take, as a training would.

    Args:
        folder: The base's, of which config.json is read.

    Raises:
        RecipeError: for a target that the base has not, a rank above a layer's, or a method that it cannot take.
        ModelError: when the folder describes no causal language model.
    """
    if recipe.method.runs == "bank":
        check_bank_method(recipe, folder)
    else:
        check_exclusive_method(recipe, folder)


def check_bank_method(recipe: Recipe, folder: Path) -> None:
    """Hold a method of the bank against the base's layers; errors as `check_method`."""
    if recipe.start_from is not None:  # an existing adapter brings its own layers
        return
    shape = outline(folder)
    check_layers(bank_spec(recipe.method), shape.layers, shape.output_name)


def check_exclusive_method(recipe: Recipe, folder: Path) -> Outline:
    """Put an exclusive method into the base without its weights; errors as `check_method`."""
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
    if recipe.task.type == "classification":
        spec = replace(spec, num_classes=2)  # how many there are shows with the data; that there are any, now
    return check(folder, spec)
