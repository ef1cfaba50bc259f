"""A base cut down to a few blocks of full width with random weights: what a block costs, before any weight is read.

Blocks of one model are alike, so what grows with their number is measured on one block and on two, with the code that
will run. The vocabulary may be cut too, for what it costs is counted and not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.base.load import torch_dtype
from luthier.errors import ModelError

CUT_VOCABULARY = 1024
"""Rows of embedding and output layer in a skeleton with a cut vocabulary."""

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def read_config(folder: Path) -> Any:
    """The base's config as transformers reads it.

    Raises:
        ModelError: when config.json describes no causal language model that transformers knows.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no config.json that transformers reads: {error}", "a base's folder") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{folder} does not describe a causal language model",
            "a folder with the config.json of an architecture that transformers knows",
        )
    return config


def skeleton(folder: Path, num_blocks: int, dtype: str | torch.dtype, *, keeps_vocabulary: bool) -> Any:
    """The architecture that the folder's config.json describes, with `num_blocks` blocks and random weights.

    Args:
        keeps_vocabulary: Whether embedding and output layer keep their size.

    Raises:
        ModelError: as `read_config`.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    text = config.get_text_config()
    text.num_hidden_layers = num_blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_blocks]
    if not keeps_vocabulary and text.vocab_size > CUT_VOCABULARY:
        text.vocab_size = CUT_VOCABULARY
        for each in (config, text):
            for name in _SPECIAL_IDS:
                setattr(each, name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), trust_remote_code=False)
