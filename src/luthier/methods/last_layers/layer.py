"""Training the last blocks in full, the rest frozen.

Trained are the last n blocks, what normalizes after them, and the output layer. An output layer that is the embedding
too (tied) stays frozen, for it would change what the frozen blocks read; a classifier has none.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from luthier.errors import ModelError
from luthier.types import ExclusiveSpec


def trained_names(model: Any, spec: ExclusiveSpec) -> list[str]:
    """Names of the parameters that train, in the model's order.

    Raises:
        ModelError: for a model whose blocks are not a list of `num_hidden_layers` modules.
    """
    parent_name, blocks_name = _blocks(model)
    parent = model.get_submodule(parent_name)
    blocks = parent.get_submodule(blocks_name)
    prefixes = [f"{parent_name}.{blocks_name}.{index}." for index in range(len(blocks))][-spec.num_layers :]
    children = [name for name, _ in parent.named_children()]
    after = set(children[children.index(blocks_name) + 1 :])
    prefixes += [f"{parent_name}.{name}." for name in children if name in after or "norm" in name]
    names = [name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))]
    if spec.num_classes is None and not _is_tied(model):
        output = model.get_output_embeddings()
        own = {id(parameter) for parameter in output.parameters()} if output is not None else set()
        names += [name for name, parameter in model.named_parameters() if id(parameter) in own and name not in names]
    return names


def _blocks(model: Any) -> tuple[str, str]:
    """Where the blocks stand: the name of their parent, and theirs within it."""
    num_blocks = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks:
            parent, _, child = name.rpartition(".")
            return parent, child
    raise ModelError(
        f"{type(model).__name__} does not keep its {num_blocks} blocks in one list",
        "an architecture that does, as nearly all in transformers",
        "use `method: full`",
    )


def _is_tied(model: Any) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight
