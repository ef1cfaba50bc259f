"""How much memory an exclusive job will take, before its process exists. It measures for itself once it has loaded.

Weights, masters, gradients and both moments of AdamW are counted; a process with torch and transformers in it, and
activations, are guessed. A transformer block keeps about 34 bytes for each token and feature in half precision: 17
values (Korthikanti et al. 2022, arXiv:2205.05198); counted for the micro-batch that the job would begin with.
"""

from __future__ import annotations

from luthier.engine.job import DEFAULT_MICRO_BATCH_TOKENS
from luthier.methods.config import exclusive_spec
from luthier.methods.exclusive.layer import Outline
from luthier.recipe import Recipe
from luthier.worker.loading import Placement

PROCESS_BYTES = 600 * 2**20
"""Python with torch, transformers and peft loaded."""

VALUES_PER_TOKEN = 17
SHARE_IF_UNKNOWN = 0.02
"""Share of the base that trains, where only loading tells."""

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def predicted_need(recipe: Recipe, placement: Placement, outline: Outline) -> int:
    """Bytes on the device where the weights are (with the process itself, on a CPU)."""
    size = _DTYPE_BYTES[placement.dtype]
    trained = outline.num_trained
    if trained is None:
        trained = int(SHARE_IF_UNKNOWN * outline.num_parameters)
    wide = max(4, size)
    masters = 4 * trained if size < 4 else 0
    owns = exclusive_spec(recipe.method).owns_weights
    weights = outline.num_parameters * size + (0 if owns else trained * wide)
    train = recipe.train
    tokens = min(train.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS, train.batch_size * train.max_length)
    activations = tokens * outline.num_layers * outline.hidden_size * VALUES_PER_TOKEN * size
    process = PROCESS_BYTES if placement.device == "cpu" else 0
    return process + weights + masters + 3 * trained * wide + activations
