"""What a slot changes, written into a model's own weights.

Shapes: O outputs, I inputs of a linear layer, D hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from luthier.checkpoints.peft_names import HEAD
from luthier.engine.slot import Slot
from luthier.errors import ModelError
from luthier.methods.method import LayerAdapter


@torch.no_grad()
def merge(model: Any, slot: Slot) -> None:
    """Write a slot into a model of its own: trained modules, then tokens' rows, then the layers' adapters.

    Args:
        model: A freshly loaded causal language model or classifier; changed in place.

    Raises:
        ModelError: where the model lacks a part that the slot changes.
    """
    output_name = _output_name(model)
    if output_name is not None and _needs_untying(model, slot, output_name):
        _untie(model)
    known = {name: model.get_submodule(name).out_features for name in slot.adapters}
    for name, trained in slot.saved_modules.items():
        _put(model, name, copy.deepcopy(trained).to(model.dtype))
    _resize(model, slot)
    if slot.token_rows is not None:
        rows = slot.token_rows
        model.get_input_embeddings().weight[rows.ids_K] = rows.input_KD.to(model.dtype)
        if output_name is not None and not _is_tied(model):
            model.get_output_embeddings().weight[rows.ids_K] = rows.output_KD.to(model.dtype)
    for name, adapter in slot.adapters.items():
        _merge_layer(model.get_submodule(name), adapter, known[name])
    if slot.head is not None and not isinstance(slot.head, nn.Linear):
        for name, parameter in slot.head.named_parameters():
            model.get_parameter(name).copy_(parameter)
    elif slot.head is not None:
        if not isinstance(getattr(model, HEAD, None), nn.Linear):
            raise ModelError(
                f"transformers' classifier {type(model).__name__} has no plain head", "a head of one matrix"
            )
        getattr(model, HEAD).weight.copy_(slot.head.weight)
        if slot.head.bias is not None:
            getattr(model, HEAD).bias.copy_(slot.head.bias)


def _output_name(model: Any) -> str | None:
    layer = model.get_output_embeddings()
    return (
        next((name for name, module in model.named_modules() if module is layer), None) if layer is not None else None
    )


def _is_tied(model: Any) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _needs_untying(model: Any, slot: Slot, output_name: str) -> bool:
    input_name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    changed = {*slot.saved_modules, *slot.adapters}
    return _is_tied(model) and bool(changed & {input_name, output_name})


def _untie(model: Any) -> None:
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _merge_layer(linear: nn.Linear, adapter: LayerAdapter, num_known: int) -> None:
    known_OI = linear.weight[:num_known]  # the output layer may have grown
    bias_O = linear.bias[:num_known] if linear.bias is not None else None
    weight_OI, merged_O = adapter.merged(known_OI, bias_O)
    known_OI.copy_(weight_OI)
    if bias_O is not None and merged_O is not None:
        bias_O.copy_(merged_O)


def _resize(model: Any, slot: Slot) -> None:
    """Make room for tokens past the base's vocabulary, which never shrinks. Rows that nobody trained are means."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    before = [(layer.weight.shape[0], layer.weight.mean(dim=0)) for layer in layers]
    size = max(num_rows for num_rows, _ in before)
    if slot.token_rows is not None:
        size = max(size, int(slot.token_rows.ids_K[-1]) + 1)
    if all(num_rows == size for num_rows, _ in before):
        model.config.get_text_config().vocab_size = size
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    for layer, (num_rows, mean_D) in zip(layers, before, strict=True):
        layer.weight[num_rows:] = mean_D
