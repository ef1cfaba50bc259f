"""BitFit: only the biases train.

    y = W x + b,    b trained, W frozen

Ben Zaken et al. 2021, arXiv:2106.10199.
"""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.types import ExclusiveSpec


def trained_names(model: Any, spec: ExclusiveSpec) -> list[str]:
    """Names of all biases, those of norms included.

    Raises:
        RecipeError: for a model without any.
    """
    output = model.get_output_embeddings() if spec.num_classes is not None else None
    unused = {id(p) for p in output.parameters()} if output is not None else set()
    names = [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and id(parameter) not in unused
    ]
    if not names:
        raise no_biases(type(model).__name__)
    return names


def no_biases(what: str) -> RecipeError:
    return RecipeError(
        f"method: bias trains biases, and {what} has none",
        "an architecture with biases, such as GPT-NeoX, OPT, Phi-2, Qwen2 or StarCoder2",
        "choose another base, or another method: ln_tuning trains as few parameters",
    )
