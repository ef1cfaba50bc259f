"""What a base is built of, from its config alone: names and shapes of its linear layers, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.base.encoder import encoder_without_weights
from luthier.data.encoders import ENCODERS, is_encoder
from luthier.engine.wrappers import is_linear
from luthier.errors import ModelError


@dataclass(frozen=True, slots=True)
class Outline:
    """A base's linear layers, and its size.

    Attributes:
        layers: Name -> (inputs, outputs), in the model's order.
        output_name: The output layer's name, or None where there is none.
        num_parameters: Of the whole base, those that layers share counted once.
        num_blocks, hidden_size, vocabulary_size: As the config has them.
        is_tied: Whether the output layer is the embedding.
    """

    layers: dict[str, tuple[int, int]]
    output_name: str | None
    num_parameters: int = 0
    num_blocks: int = 0
    hidden_size: int = 0
    vocabulary_size: int = 0
    is_tied: bool = False


def read_config(folder: Path) -> Any:
    """The base's config as transformers reads it.

    Raises:
        ModelError: when config.json describes no causal language model or encoder that is known.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _undescribed(folder, error) from error
    if not is_encoder(config.to_dict()) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _undescribed(folder, f"transformers has none of type {config.model_type}")
    return config


def _undescribed(folder: Path, why: object) -> ModelError:
    return ModelError(
        f"{folder} does not describe a causal language model: {why}",
        "a folder with the config.json of an architecture that transformers knows, or of an encoder: "
        + ", ".join(sorted(ENCODERS)),
    )


def without_weights(folder: Path) -> Any:
    """The architecture that the folder's config.json describes, on the meta device, which holds no values; tied.

    Raises:
        ModelError: when transformers makes no causal language model or encoder of it.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    try:
        if is_encoder(config.to_dict()):
            return encoder_without_weights(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _undescribed(folder, error) from error
    model.tie_weights()
    return model


def outline(folder: Path) -> Outline:
    """Names and shapes of the base's linear layers; errors as `without_weights`."""
    model = without_weights(folder)
    output = model.get_output_embeddings()
    vocabulary_size, hidden_size = model.get_input_embeddings().weight.shape
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    return Outline(
        {name: (module.in_features, module.out_features) for name, module in linears.items()},
        next((name for name, module in model.named_modules() if module is output), None),
        sum(parameter.numel() for parameter in model.parameters()),
        model.config.get_text_config().num_hidden_layers,
        hidden_size,
        vocabulary_size,
        output is not None and output.weight is model.get_input_embeddings().weight,
    )
