"""What an exclusive job writes: its exact state in a checkpoint, and at the end a whole model or peft's adapter files.

CHECKPOINT/trained-00001-of-00002.safetensors     trained tensors by their names in the model, float32 masters where
                                                  the base is held in less, and what the method keeps besides
RUN/model/      own weights: config.json, safetensors, tokenizer, chat template; transformers loads it alone
RUN/adapter/    a method of peft: peft's own files; peft loads them alone over the base
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.base.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from luthier.base.own import OwnBase
from luthier.checkpoints.peft_format import CLASSIFIER_FOLDER, TASK_TYPES, classifier_class, classifier_config
from luthier.checkpoints.peft_names import HEAD
from luthier.checkpoints.tensor_file import read_tensors, write_tensors
from luthier.engine.own import OwnSlot
from luthier.errors import ModelError
from luthier.files import writing
from luthier.methods.peft.adalora import AdaloraHooks
from luthier.methods.peft.layer import PeftBase

SHARD_BYTES = 4 * 10**9
"""Most bytes of one file; only one shard is copied to the CPU at a time."""

GENERATION_FILE = "generation_config.json"
_PARAMETER, _METHOD = "parameter.", "method."


def write_trained(slot: OwnSlot, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all that `read_trained` needs to put a slot where it is.

    Raises:
        StorageError: where writing fails.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    values = {**slot.parameters(), **slot.whole}
    tensors: dict[str, Tensor] = {_PARAMETER + name: tensor for name, tensor in values.items()}
    tensors |= {_METHOD + name: tensor for name, tensor in slot.state().items()}
    shards = _shards(tensors, shard_bytes)
    for number, names in enumerate(shards, start=1):
        path = folder / f"trained-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(path, {name: tensors[name] for name in names})


def read_trained(slot: OwnSlot, folder: Path) -> None:
    """Put the values of a checkpoint into a slot that was made alike.

    Raises:
        ModelError: when they are of another shape, or damaged.
    """
    paths = sorted(folder.glob("trained-*.safetensors"))
    if not paths:
        raise ModelError(f"{folder} holds no trained weights", "a checkpoint of the same method", "take another one")
    tensors = {name: tensor for path in paths for name, tensor in read_tensors(path).items()}
    try:
        slot.load(_part(tensors, _PARAMETER))
    except (KeyError, ValueError) as error:
        raise ModelError(f"{folder} does not fit this job: {error.args[0]}", "what the recipe's method says") from None
    slot.load_state(_part(tensors, _METHOD))


def write_result(
    base: OwnBase,
    folder: Path,
    *,
    base_name: str,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    threshold: float | None = None,
) -> None:
    """Write what the job made: a whole model, or peft's adapter files.

    Args:
        folder: Made if need be. Not replaced as a whole: use `luthier.files.atomic_folder` around this.
        base_name: What an adapter's files call the base.
        labels, pad_token_id, threshold: As `peft_format.write_adapter` takes them.

    Raises:
        StorageError: where writing fails.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(base, PeftBase):
            _write_adapter(base, folder, base_name, _classes(base, labels, pad_token_id, threshold))
        elif base.slot.head is not None:
            _write_classifier(base, folder, _classes(base, labels, pad_token_id, threshold))
        else:
            _write_model(base, folder)


def _classes(base: OwnBase, labels: Sequence[str] | None, pad_token_id: int | None, threshold: float | None) -> Any:
    """The config of the head; None without one."""
    num_classes = base.slot.spec.num_classes
    if base.slot.head is None or num_classes is None:
        return None
    return classifier_config(base, num_classes, labels, pad_token_id, base.slot.spec.head, threshold)


# -- own weights


def _write_model(base: OwnBase, folder: Path) -> None:
    from transformers import GenerationConfig

    model = base.as_transformers()
    generation = getattr(model, "generation_config", None)
    if model.can_generate():
        model.generation_config = GenerationConfig()  # the base's own is copied, whatever transformers thinks of it
    try:
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    finally:
        model.generation_config = generation
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    if base.folder is not None and (base.folder / GENERATION_FILE).is_file():
        shutil.copyfile(base.folder / GENERATION_FILE, folder / GENERATION_FILE)


def _write_classifier(base: OwnBase, folder: Path, config: Any) -> None:
    """The body with the head, as transformers' classifier of the architecture."""
    head = base.slot.head
    assert head is not None
    config.dtype = base.dtype
    model = base.as_transformers()
    with torch.device("meta"):
        classifier: Any = classifier_class(config, base.slot.spec.head)(config)
    classifier.to(base.dtype)
    own = classifier.state_dict()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    state |= {f"{HEAD}.{name}": parameter.detach().to(base.dtype) for name, parameter in head.named_parameters()}
    classifier.load_state_dict(state, assign=True)
    classifier.save_pretrained(folder, max_shard_size=SHARD_BYTES)


# -- methods of peft


def _write_adapter(base: PeftBase, folder: Path, base_name: str, classes: Any) -> None:
    hooks = base.slot.method_hooks
    if isinstance(hooks, AdaloraHooks):
        hooks.keep_what_is_left()
    config = base.peft_model.active_peft_config
    before = config.base_model_name_or_path
    config.base_model_name_or_path = base_name
    try:
        base.peft_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before
    (folder / "README.md").unlink(missing_ok=True)  # the run has a card of its own
    if base.slot.head is not None:
        _add_head(base, folder)
        classes.save_pretrained(str(folder / CLASSIFIER_FOLDER))


def _add_head(base: PeftBase, folder: Path) -> None:
    """peft keeps a classifier's head among the modules that are saved in full."""
    import json

    from luthier.base.adapter_files import PREFIX
    from luthier.files import write_text

    assert base.slot.head is not None
    tensors = read_tensors(folder / WEIGHTS_FILE)
    head = {f"{PREFIX}{HEAD}.{name}": parameter for name, parameter in base.slot.head.named_parameters()}
    write_tensors(folder / WEIGHTS_FILE, tensors | head)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["task_type"] = TASK_TYPES[base.slot.spec.head]
    config["modules_to_save"] = [*(config.get("modules_to_save") or []), HEAD]
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most `shard_bytes`; a larger tensor is a group by itself."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards
