"""What a base is built of, from its config alone: names and shapes of its linear layers, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.engine.wrappers import is_linear
from luthier.errors import ModelError


@dataclass(frozen=True, slots=True)
class Outline:
    """A base's linear layers.

    Attributes:
        layers: Name -> (inputs, outputs), in the model's order.
        output_name: The output layer's name, or None where there is none.
    """

    layers: dict[str, tuple[int, int]]
    output_name: str | None


def without_weights(folder: Path) -> Any:
    """The architecture that the folder's config.json describes, on the meta device, which holds no values; tied.

    Raises:
        ModelError: when transformers makes no causal language model of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} does not describe a causal language model: {error}",
            "a folder with the config.json of an architecture that transformers knows",
        ) from error
    model.tie_weights()
    return model


def outline(folder: Path) -> Outline:
    """Names and shapes of the base's linear layers; errors as `without_weights`."""
    model = without_weights(folder)
    output = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    return Outline(
        {name: (module.in_features, module.out_features) for name, module in linears.items()},
        next((name for name, module in model.named_modules() if module is output), None),
    )
