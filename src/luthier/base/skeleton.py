"""A base cut down to a few blocks of full width with random weights: what a block costs, before any weight is read.

Blocks of one model are alike, so what grows with their number is measured on one block and on two, with the code that
will run. The vocabulary may be cut too, for what it costs is counted and not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.base.encoder import Encoder
from luthier.base.model import torch_dtype
from luthier.base.outline import read_config
from luthier.data.encoders import is_encoder

CUT_VOCABULARY = 1024
"""Rows of embedding and output layer in a skeleton with a cut vocabulary."""

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def skeleton(folder: Path, num_blocks: int, dtype: str | torch.dtype, *, keeps_vocabulary: bool) -> Any:
    """The architecture that the folder's config.json describes, with `num_blocks` blocks and random weights.

    Args:
        keeps_vocabulary: Whether embedding and output layer keep their size.

    Raises:
        ModelError: as `read_config`.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    config = read_config(folder)
    text = config.get_text_config()
    text.num_hidden_layers = num_blocks
    padding = getattr(config, "pad_token_id", None)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_blocks]
    if not keeps_vocabulary and text.vocab_size > CUT_VOCABULARY:
        text.vocab_size = CUT_VOCABULARY
        for each in (config, text):
            for name in _SPECIAL_IDS:
                setattr(each, name, None)
        if is_encoder(config.to_dict()):
            config.pad_token_id = min(padding or 0, CUT_VOCABULARY - 1)  # positions may be counted from it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if is_encoder(config.to_dict()):
            return Encoder(AutoModel.from_config(config, dtype=torch_dtype(dtype), trust_remote_code=False))
        return AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), trust_remote_code=False)
