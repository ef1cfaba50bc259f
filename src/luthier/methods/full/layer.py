"""Full fine-tuning: every weight trains.

W' = W + dW,    dW of full rank, in every layer
"""

from __future__ import annotations

from typing import Any

from luthier.types import ExclusiveSpec


def trained_names(model: Any, spec: ExclusiveSpec) -> list[str]:
    """Every parameter, once where two layers share it; a classifier has no output layer, so none is trained there."""
    names = [name for name, _ in model.named_parameters()]
    if spec.num_classes is None:
        return names
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    kept = {id(embedding.weight)}
    unused = {id(p) for p in output.parameters()} - kept if output is not None else set()
    return [name for name, parameter in model.named_parameters() if id(parameter) not in unused]
