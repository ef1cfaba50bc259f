"""Make a base that an exclusive job owns, and see beforehand, without its weights, whether the two go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.base.model import load_model
from luthier.base.outline import without_weights
from luthier.base.own import OwnBase
from luthier.engine.own import OwnSlot
from luthier.errors import RecipeError
from luthier.methods.bias import layer as bias
from luthier.methods.full import layer as full
from luthier.methods.last_layers import layer as last_layers
from luthier.methods.peft.fields import STEPS_IF_UNKNOWN, VIRTUAL_TOKENS, check_fields
from luthier.methods.peft.layer import peft_base, put_into
from luthier.types import ExclusiveSpec

_TRAINED: dict[str, Callable[[Any, ExclusiveSpec], list[str]]] = {
    "full": full.trained_names,
    "last_layers": last_layers.trained_names,
    "bias": bias.trained_names,
}


@dataclass(frozen=True, slots=True)
class Outline:
    """What a job will be, known before any weight is read.

    Attributes:
        num_parameters: Of the base.
        num_trained: Of those that train; None where only loading tells.
        num_layers, hidden_size: Of the base, for a guess at activations.
    """

    num_parameters: int
    num_trained: int | None
    num_layers: int
    hidden_size: int


def load_own(
    folder: Path,
    spec: ExclusiveSpec,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    has_masters: bool = True,
) -> OwnBase:
    """Load a copy of the base for one job, with what trains in it.

    Args:
        has_masters: As `OwnSlot` has it.

    Raises:
        RecipeError: when method and base do not go together.
        ModelError: when the folder holds no causal language model.
    """
    return own_over(load_model(folder, device=device, dtype=dtype), folder, spec, seed=seed, has_masters=has_masters)


def own_over(model: Any, folder: Path, spec: ExclusiveSpec, *, seed: int, has_masters: bool = True) -> OwnBase:
    """Put what trains into a model, which the job owns from then on.

    Raises:
        RecipeError: when method and base do not go together.
    """
    num_parameters = _count(model)
    if not spec.owns_weights:
        return peft_base(put_into(model, spec, folder, seed), folder, spec, num_parameters, seed)
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    live = {name: parameters[name] for name in _TRAINED[spec.method](model, spec)}
    slot = OwnSlot(spec, live, has_masters=has_masters)
    return OwnBase(model, folder, slot, num_parameters, seed)


def check(folder: Path, spec: ExclusiveSpec) -> Outline:
    """Refuse a job that cannot work, from the base's config alone.

    The model is built without weights, and the method put into it. What only shows with weights is left to `load_own`.

    Raises:
        RecipeError: with the reason.
        ModelError: when the folder describes no causal language model.
    """
    if not spec.owns_weights:
        check_fields(spec)
        if spec.peft_type in VIRTUAL_TOKENS and spec.num_classes is not None:
            raise RecipeError(
                f"method: {spec.peft_type.lower()} puts virtual tokens before a text, and a classifier reads none",
                "a method that changes layers",
                "use `task: {type: classification, head: words}`, or a method such as lokr or boft",
            )
    model = without_weights(folder)
    num_layers = model.config.get_text_config().num_hidden_layers
    if spec.method == "last_layers" and spec.num_layers > num_layers:
        raise RecipeError(
            f"method.layers: {spec.num_layers}, and the base has {num_layers} blocks",
            f"1 to {num_layers}",
            "lower it, or use `method: full`",
        )
    if spec.method == "bias" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise bias.no_biases(str(model.config.model_type))
    num_parameters = _count(model)
    num_trained = _num_trained(model, folder, spec)
    return Outline(num_parameters, num_trained, num_layers, model.get_input_embeddings().weight.shape[1])


def _num_trained(model: Any, folder: Path, spec: ExclusiveSpec) -> int | None:
    if spec.owns_weights:
        parameters = dict(model.named_parameters())
        return sum(parameters[name].numel() for name in _TRAINED[spec.method](model, spec))
    if spec.peft_type in VIRTUAL_TOKENS:
        return None  # its start may be taken from embeddings, which are not there yet
    try:
        with torch.device("meta"):
            known = replace(spec, total_steps=spec.total_steps or STEPS_IF_UNKNOWN)
            changed = put_into(model, known, folder, seed=0, is_meta=True)
    except RecipeError as error:
        if _is_for_want_of_weights(error):
            return None
        raise
    return sum(p.numel() for p in changed.parameters() if p.requires_grad)


def _is_for_want_of_weights(error: RecipeError) -> bool:
    """Some methods compute from the weights as they are put in; torch says then that there are none."""
    return isinstance(error.__cause__, NotImplementedError | RuntimeError) or "meta" in str(error.__cause__)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
