"""PEFT's files as a slot: an adapter that Luthier or peft wrote, to go on from or to chat with.

Shapes: D hidden size, V rows of the base's embedding, W rows of an embedding in the files, K trained tokens.

What is trained is read off the tensors. peft writes the whole embedding beside the adapter where the vocabulary was
resized; its rows that differ from the base's become trained tokens of the slot, so that the logits are peft's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from luthier.base.adapter_files import HEAD_NAMES, PREFIX, AdapterFiles, read_adapter
from luthier.base.encoder import Encoder
from luthier.base.identity import read_trained_over
from luthier.base.load import Base
from luthier.checkpoints.peft_names import OF_HEAD, TOKENS, module_names
from luthier.checkpoints.tensor_file import read_tensors
from luthier.engine.bank import Bank
from luthier.engine.slot import Slot
from luthier.errors import ModelError
from luthier.methods.method import LayerAdapter
from luthier.methods.registry import METHODS
from luthier.types import AdapterSpec


@dataclass(slots=True)
class _Contents:
    """An adapter's files, taken apart.

    Attributes:
        values: `Slot.tensors` name -> tensor.
        adapted: Adapted layer, in the model's order -> its tensors.
        saved: Module trained in full -> its tensors, buffers included.
        token_ids: Ascending.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    adapted: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()


def slot_from_adapter(base: Base, folder: Path, dropout: float | None = None, *, lora_plus_ratio: float = 1.0) -> Slot:
    """Admit an existing adapter as a slot.

    Args:
        folder: The adapter's, or a run's or checkpoint's that holds one.
        dropout: For training on; None keeps the adapter's own.
        lora_plus_ratio: For training on; files do not hold it.

    Raises:
        ModelError: for an adapter of another kind or for another base, or damaged files. An adapter that says which
            base it was trained over is held to that base's hash and quantization.
    """
    files = read_adapter(folder)
    check_trained_over(base, files.folder)
    contents = _take_apart(base.bank, files)
    spec = replace(
        files.spec(),
        dropout=files.own.dropout if dropout is None else dropout,
        lora_plus_ratio=lora_plus_ratio,
        modules_to_save=tuple(contents.saved),
        new_tokens=contents.token_ids,
    )
    slot = base.bank.add(replace(spec, targets=(), feedforward=None), seed=0)
    try:
        base.bank.adapt(slot, _adapters(base.bank, files, contents, spec))
        for name, tensors in contents.saved.items():
            _fill(slot.saved_modules[name], tensors, name, base.bank, files)
        rows = slot.token_rows
        if rows is not None and rows.is_tied and "token_rows.output" in contents.values:
            rows.output_KD = nn.Parameter(rows.input_KD.detach().clone())  # the base ties the two; the adapter does not
        slot.load(contents.values)
    except BaseException:
        base.bank.remove(slot)
        raise
    slot.spec = spec
    return slot


def _adapters(bank: Bank, files: AdapterFiles, contents: _Contents, own: AdapterSpec) -> dict[str, LayerAdapter]:
    method = METHODS[files.method]
    adapters = {}
    for name, tensors in contents.adapted.items():
        try:
            spec = replace(files.layer_spec(name), dropout=own.dropout, lora_plus_ratio=own.lora_plus_ratio)
            adapters[name] = method.adopt(spec, name, bank.layer(name), tensors)
        except ValueError as error:
            raise _misfit(files, str(error), "this base's layers") from None
    return adapters


def check_trained_over(base: Base, folder: Path) -> None:
    """Refuse an adapter on a base whose weights or quantization are not those that it was trained over.

    Raises:
        ModelError: naming both.
    """
    expected, found = read_trained_over(folder), base.key()
    if expected is None or found is None or expected.computes_as(found):
        return
    raise ModelError(
        f"{folder} was trained over the weights {expected.described}, and this base has {found.described}",
        "the same base, quantized in the same way",
        "set `method: {type: qlora}` to hold the base in NF4"
        if expected.quantization and not found.quantization and expected.weights_hash == found.weights_hash
        else "name in `base` (and by `method`) what the adapter was trained over",
    )


def load_values(slot: Slot, base: Base, folder: Path) -> None:
    """Put the values of an adapter's files into a slot that was made alike.

    Raises:
        ModelError: when the files are of another shape, or damaged.
    """
    files = read_adapter(folder)
    contents = _take_apart(base.bank, files)
    own_ids = tuple(slot.token_rows.ids_K.tolist()) if slot.token_rows is not None else ()
    if contents.token_ids != own_ids:
        raise _misfit(files, f"it trains the tokens {_few(contents.token_ids)}", f"the tokens {_few(own_ids)}")
    for name in slot.saved_modules.keys() & contents.saved.keys():
        _fill(slot.saved_modules[name], contents.saved[name], name, base.bank, files)
    try:
        slot.load(contents.values)
    except (KeyError, ValueError) as error:
        raise _misfit(files, str(error.args[0]), "what the recipe's method says") from None


# -- taking the files apart


def _take_apart(bank: Bank, files: AdapterFiles) -> _Contents:
    tensors = _with_plain_names(read_tensors(files.weights))
    contents = _Contents()
    _take_adapted(bank, files, tensors, contents)
    if files.num_classes is not None and isinstance(bank.model, Encoder):
        _take_encoder_head(bank.model, files, files.num_classes, tensors, contents)
    elif files.num_classes is not None:
        head = next(name for name in HEAD_NAMES if f"{name}.weight" in tensors)
        contents.values["head.weight"] = tensors.pop(f"{head}.weight")
        if f"{head}.bias" in tensors:
            contents.values["head.bias"] = tensors.pop(f"{head}.bias")
    _take_saved(bank, files, tensors, contents)
    _take_token_rows(bank, files, tensors, contents)
    if tensors:
        raise ModelError(
            f"{files.folder} holds {_few(sorted(tensors))}, which is not understood",
            "tensors of its method, modules named in modules_to_save, and trained tokens",
            "merge it into its base with peft (merge_and_unload), save that, and name the folder under `base`",
        )
    return contents


def _take_encoder_head(
    model: Encoder, files: AdapterFiles, num_classes: int, tensors: dict[str, Tensor], contents: _Contents
) -> None:
    """The head's modules; what an adapter leaves out, as peft's own leave BERT's pooler, is the base's."""
    for name, parameter in model.empty_head(num_classes, files.head or "sequence").named_parameters():
        found = tensors.pop(name, model.pretrained.get(name))
        if found is None or found.shape != parameter.shape:
            has = "it lacks" if found is None else f"of shape {tuple(found.shape)} is"
            raise _misfit(files, f"{has} {name}", f"{name} of shape {tuple(parameter.shape)}")
        contents.values[OF_HEAD + name] = found


def _with_plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without peft's prefix; of a module trained in full, one copy under the module's own name."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".original_module." not in name:  # what the module was before; an adapter never computes with it
            plain.setdefault(name.removeprefix(PREFIX).replace(".modules_to_save.", "."), tensor)
    return plain


def _take_adapted(bank: Bank, files: AdapterFiles, tensors: dict[str, Tensor], contents: _Contents) -> None:
    first, *_ = ends = files.format.tensors
    named = {name.removesuffix(f".{first}") for name in tensors if name.endswith(f".{first}")}
    strange = sorted(named - set(bank.linears))
    if strange:
        raise _misfit(files, f"it adapts {strange[0]}, which is no linear layer of this base", "this base's layers")
    for name in (layer for layer in bank.linears if layer in named):
        contents.adapted[name] = {end: tensors.pop(f"{name}.{end}") for end in ends}
        contents.values |= {f"{name}.{end}": tensor for end, tensor in contents.adapted[name].items()}


def _take_saved(bank: Bank, files: AdapterFiles, tensors: dict[str, Tensor], contents: _Contents) -> None:
    names = module_names(bank.model)
    for wanted in files.modules_to_save:
        # peft takes any name that ends so, in the middle of a word too.
        for module in (name for name in names if name.endswith(wanted) and name not in contents.saved):
            inside = {name for name in tensors if name.startswith(f"{module}.")}
            if inside:
                contents.saved[module] = {name.removeprefix(f"{module}."): tensors.pop(name) for name in sorted(inside)}
    for module, parts in contents.saved.items():
        parameters = dict(bank.original(module).named_parameters())
        contents.values |= {f"{module}.{name}": tensor for name, tensor in parts.items() if name in parameters}


def _take_token_rows(bank: Bank, files: AdapterFiles, tensors: dict[str, Tensor], contents: _Contents) -> None:
    layers = [bank.input_name] + ([bank.output_name] if bank.output_name is not None else [])
    changed = {layer: _changed_rows(bank, files, layer, tensors) for layer in layers}
    ids = tuple(sorted({token for rows in changed.values() for token in rows}))
    contents.token_ids = ids
    if not ids:
        return
    fresh = bank.token_rows(ids)
    starts = {bank.input_name: fresh.input_KD, bank.output_name: fresh.output_KD}
    given = {layer: _with_rows(starts[layer], ids, changed[layer], contents.saved.get(layer)) for layer in layers}
    contents.values["token_rows.input"] = given[bank.input_name]
    if bank.output_name is None:
        return
    differ = not torch.equal(given[bank.input_name], given[bank.output_name])
    if not fresh.is_tied or (changed[bank.output_name] and differ):
        contents.values["token_rows.output"] = given[bank.output_name]


def _changed_rows(bank: Bank, files: AdapterFiles, layer: str, tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """Rows that the files give to the embedding or output layer, by token."""
    rows: dict[int, Tensor] = {}
    for end in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
        whole_WD = tensors.pop(f"{layer}.{end}", None)
        if whole_WD is not None:
            base_VD: Tensor = bank.original(layer).weight.detach().cpu()  # type: ignore[assignment, operator]
            num_known = min(len(base_VD), len(whole_WD))
            given_VD = whole_WD[:num_known].to(base_VD.dtype)
            differs_V = (given_VD != base_VD[:num_known]).any(dim=1)
            differing = [*differs_V.nonzero()[:, 0].tolist(), *range(num_known, len(whole_WD))]
            rows |= {token: whole_WD[token] for token in differing}
    delta_KD = tensors.pop(f"{layer}.{TOKENS}", None)
    if delta_KD is not None:
        ids = _indices(files, layer)
        if len(ids) != len(delta_KD):
            raise _misfit(
                files, f"{len(delta_KD)} rows of trained tokens in {layer}", f"{len(ids)}, as its config says"
            )
        rows |= dict(zip(ids, delta_KD, strict=True))
    return rows


def _indices(files: AdapterFiles, layer: str) -> tuple[int, ...]:
    """Token ids of one layer's trained rows, in the order of the rows."""
    indices = files.config.get("trainable_token_indices") or ()
    if isinstance(indices, Mapping):
        named = [ids for name, ids in indices.items() if layer.endswith(name)]
        # Where the base ties the two layers, peft lists one of them and writes both.
        indices = named[0] if named else next(iter(indices.values()), ())
    return tuple(int(token) for token in indices)


def _with_rows(
    rows_KD: Tensor, ids: tuple[int, ...], changed: dict[int, Tensor], saved: dict[str, Tensor] | None
) -> Tensor:
    """The rows of `ids`: changed ones, else those of the layer's trained copy if it has one, else as they are."""
    out_KD = rows_KD.detach().clone()
    for at, token in enumerate(ids):
        if token in changed:
            out_KD[at] = changed[token].to(out_KD)
        elif saved is not None and token < len(saved["weight"]):
            out_KD[at] = saved["weight"][token].to(out_KD)
    return out_KD


# -- putting them into a slot


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], name: str, bank: Bank, files: AdapterFiles) -> None:
    """Take a saved module's tensors in; an embedding or output layer may have grown."""
    own = module.state_dict()
    if own.keys() != tensors.keys():
        raise _misfit(files, f"{name} holds {_few(sorted(tensors))}", _few(sorted(own)))
    for part, tensor in tensors.items():
        if tensor.shape != own[part].shape:
            if name not in (bank.input_name, bank.output_name) or tensor.shape[1:] != own[part].shape[1:]:
                raise _misfit(files, f"{name}.{part} has shape {tuple(tensor.shape)}", str(tuple(own[part].shape)))
            parameter = getattr(module, part)
            setattr(module, part, nn.Parameter(tensor.to(parameter), requires_grad=parameter.requires_grad))
            setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(tensor))
    module.load_state_dict(dict(tensors))


def _misfit(files: AdapterFiles, found: str, expected: str) -> ModelError:
    return ModelError(
        f"{files.folder} does not fit this base: {found}",
        expected,
        f"take the base that its adapter_config.json names: {files.base_name}" if files.base_name else "",
    )


def _few(names: object) -> str:
    listed = [str(name) for name in names]  # type: ignore[attr-defined]
    return (", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")) or "none"
