"""A slot as PEFT's files. The way back is in `peft_read`; its verbs can be had from here too.

A language-modelling adapter loads with `PeftModel.from_pretrained(model, folder)`. Two cases need a word more:

- New tokens past the base's vocabulary: first `model.resize_token_embeddings(len(tokenizer))`, where that is more than
  the model has, with the tokenizer that stands in the same folder. `AutoPeftModelForCausalLM.from_pretrained(folder)`
  does it by itself.
- A sequence head: a config with the number and names of the classes and the padding token stands in the folder's
  `classifier/` (beside the adapter it would make transformers look for a whole model there), so that

      config = AutoConfig.from_pretrained(folder, subfolder="classifier")
      model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)

  gives equal logits from transformers 5.18 on (5.17 leaves an adapter's head unread, and says so); so does
  `PeftModel.from_pretrained(base, folder)` over a base that was loaded with that config, in every version.
  transformers pools at the last token that is not the padding token; a text never ends in it, so that is the text's
  last token, alone or in a right-padded batch. A token head loads likewise, with `AutoModelForTokenClassification`.
  A head of any number of labels is a sequence head whose config has `problem_type: multi_label_classification` and,
  beyond what transformers reads, the probability from which on a label is given (`label_threshold`).

An encoder's adapter loads in the same way. Its head may have several modules, all of which stand in `modules_to_save`,
and reads the first token; the padding token is the base's own, on which positions may depend.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from luthier.base.adapter_files import CLASSIFIER_FOLDER, MULTILABEL, WEIGHTS_FILE
from luthier.base.encoder import Encoder, head_modules, reads_first
from luthier.base.identity import write_trained_over
from luthier.base.load import Base
from luthier.checkpoints.peft_names import HEAD, module_names, to_peft
from luthier.checkpoints.peft_read import load_values, slot_from_adapter
from luthier.checkpoints.tensor_file import write_tensors
from luthier.engine.bank import Bank
from luthier.engine.slot import Slot
from luthier.errors import ModelError, RecipeError
from luthier.files import writing
from luthier.methods.formats import FORMATS
from luthier.methods.registry import METHODS
from luthier.types import DEFAULT_THRESHOLD, HeadKind

__all__ = ["check_writable", "classifier_config", "load_values", "peft_config", "slot_from_adapter", "write_adapter"]

TASK_TYPES: dict[HeadKind, str] = {"sequence": "SEQ_CLS", "multilabel": "SEQ_CLS", "token": "TOKEN_CLS"}
"""PEFT's words for the kinds of heads."""
NO_TARGETS = "dummy-target-modules"
"""PEFT's own word for an adapter that adapts no layer, but trains modules in full."""

_PROBLEM_TYPES: dict[HeadKind, str | None] = {
    "sequence": "single_label_classification",
    "multilabel": MULTILABEL,
    "token": None,
}
_CLASSIFIERS: dict[HeadKind, str] = {
    "sequence": "sequence classifier",
    "multilabel": "sequence classifier",
    "token": "token classifier",
}
_ANOTHER_WAY: dict[HeadKind, str] = {
    "sequence": "use `task: {type: classification, head: words}`, or another base",
    "multilabel": "use another base",
    "token": "use another base",
}


def write_adapter(
    slot: Slot,
    base: Base,
    folder: Path,
    *,
    base_name: str,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    threshold: float | None = None,
    revision: str | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, and for a head classifier/config.json.

    Beside them stands trained_over.json, which peft passes over: the base's hash, quantization and type.

    Args:
        folder: Made if need be. Not replaced as a whole: use `luthier.files.atomic_folder` around this.
        base_name: What the files call the base: a Hub id, or a path.
        labels: Names of the classes of a slot with a sequence head, in their order; None numbers them.
        pad_token_id: The padding token of the tokenizer; None takes the base's config's, else its EOS.
        threshold: The probability from which on a multilabel head's label is given; None for one half.
        revision: The base's revision on the Hub.

    Raises:
        RecipeError: for a slot that PEFT's files cannot hold; see `check_writable`.
        StorageError: where writing fails.
    """
    check_writable(slot, base)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        peft_config(slot, base, base_name, revision).save_pretrained(str(folder))
        if slot.head is not None:
            assert slot.spec.num_classes is not None
            config = classifier_config(base, slot.spec.num_classes, labels, pad_token_id, slot.spec.head, threshold)
            config.save_pretrained(str(folder / CLASSIFIER_FOLDER))
    write_tensors(folder / WEIGHTS_FILE, to_peft(slot, base.bank))
    key = base.key()
    if key is not None:
        write_trained_over(folder, key)


def check_writable(slot: Slot, base: Base) -> None:
    """Refuse, before any training, a slot that peft and transformers could not load again.

    Raises:
        RecipeError: naming the two parts that do not go together, or what the base lacks.
    """
    bank = base.bank
    ends = {bank.input_name: "the embedding", bank.output_name: "the output layer"}
    for name in slot.saved_modules:
        inner = [adapted for adapted in slot.adapters if adapted == name or adapted.startswith(f"{name}.")]
        if inner:
            raise _conflict(f"{inner[0]} is adapted, and {name} trained in full", "take it out of one of the two")
        if slot.token_rows is not None and name in ends:
            raise _conflict(
                f"new_tokens trains rows of {ends[name]}, and modules_to_save the whole of it ({name})",
                "leave one of the two out",
            )
    if slot.token_rows is not None and "trainable_token_indices" not in FORMATS[slot.spec.method].fields:
        raise _conflict(f"new_tokens, which PEFT's files of {slot.spec.method} have no place for", "leave it out")
    if slot.token_rows is not None and slot.head is None:
        if bank.output_name in slot.adapters:
            raise _conflict(
                f"new_tokens trains rows of {bank.output_name}, which is adapted too", "leave one of them out"
            )
        if bank.is_tied and not slot.token_rows.is_tied:
            raise _conflict("new tokens have two different rows, and the base ties the two", "merge it into its base")
        if base.head_bias_V is not None:
            raise _conflict("new_tokens on a base whose output layer has a bias, which PEFT would drop", "leave it out")
    if slot.head is not None:
        _check_classifier(slot, base)


def peft_config(slot: Slot, base: Base, base_name: str, revision: str | None = None) -> Any:
    """PEFT's own config of the slot."""
    spec = slot.spec
    saved = [*_head_modules(slot), *slot.saved_modules]
    fields: dict[str, Any] = {
        "modules_to_save": saved or None,
        "task_type": TASK_TYPES[slot.spec.head] if slot.head is not None else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
    }
    indices = _token_indices(slot, base.bank)
    if indices is not None:
        fields["trainable_token_indices"] = indices
    return METHODS[spec.method].peft_config(spec, slot.adapters, _targets(slot, base), fields)


def classifier_config(
    base: Base,
    num_classes: int,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    kind: HeadKind = "sequence",
    threshold: float | None = None,
) -> Any:
    """The base's config with the classes, and with the padding token that transformers' pooling needs.

    Args:
        labels, pad_token_id, threshold: As in `write_adapter`.
        kind: What the head says a class of.

    Raises:
        ModelError: when there are not as many labels as classes.
    """
    from transformers import AutoConfig

    config = copy.deepcopy(base.config) if base.folder is None else AutoConfig.from_pretrained(base.folder)
    names = list(labels) if labels is not None else [f"LABEL_{index}" for index in range(num_classes)]
    if len(names) != num_classes:
        raise ModelError(f"{len(names)} labels for a head of {num_classes} classes", "one label a class")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = _PROBLEM_TYPES[kind]
    if kind == "multilabel":
        config.label_threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    config.architectures = [classifier_class(config, kind).__name__]
    text = config.get_text_config()
    if base.is_encoder:
        reads_first(config)
        return config
    text.pad_token_id = next(
        value for value in (pad_token_id, text.pad_token_id, _first(text.eos_token_id), 0) if value is not None
    )
    return config


def classifier_class(config: Any, kind: HeadKind = "sequence") -> type[nn.Module]:
    """transformers' sequence or token classifier of this architecture.

    Raises:
        RecipeError: where there is none.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    classes: Any = (
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING if kind == "token" else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    if type(config) not in classes:
        raise RecipeError(
            f"task: transformers has no {_CLASSIFIERS[kind]} for the architecture {config.model_type!r}",
            "an architecture with one, such as llama, mistral, qwen3, phi3 or gemma",
            _ANOTHER_WAY[kind],
        )
    return cast(type[nn.Module], classes[type(config)])


def head_kind(config: Any) -> HeadKind | None:
    """What the head of a model with this config says a class of; None for a language model, or for no config."""
    names = (getattr(config, "architectures", None) or ()) if config is not None else ()
    if any("TokenClassification" in name for name in names):
        return "token"
    if not any("SequenceClassification" in name for name in names):
        return None
    return "multilabel" if config.problem_type == MULTILABEL else "sequence"


def _check_classifier(slot: Slot, base: Base) -> None:
    output = base.bank.output_name
    if output in slot.adapters or output in slot.saved_modules:
        raise _conflict(f"a classifier has no output layer, and {output} is to be trained", "leave it out")
    kind = slot.spec.head
    if base.is_encoder:
        return  # its head is that classifier's own
    if not _has_plain_head(classifier_class(base.config, kind), base.config):
        raise RecipeError(
            f"task: transformers' {_CLASSIFIERS[kind]} for {base.config.model_type!r} has more than a plain head",
            "an architecture such as llama, mistral, qwen3, phi3 or gemma",
            _ANOTHER_WAY[kind],
        )


def _has_plain_head(model_class: type[nn.Module], config: Any) -> bool:
    """Whether the classes are one matrix times the hidden state; encoders put more layers in between."""
    from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

    if issubclass(model_class, GenericForSequenceClassification | GenericForTokenClassification):
        return True
    with torch.device("meta"):
        head = getattr(model_class(config), HEAD, None)
    return isinstance(head, nn.Linear) and head.bias is None


def _targets(slot: Slot, base: Base) -> list[str] | str:
    """The ends of the names, as people write them, where PEFT takes them for exactly these layers; else whole names."""
    if not slot.adapters:
        return NO_TARGETS
    ends = sorted({name.rsplit(".", 1)[-1] for name in slot.adapters})
    names = [n for n in module_names(base.model) if slot.head is None or n != base.bank.output_name]
    if slot.head is not None and isinstance(base.model, Encoder):
        names += [name for name, _ in slot.head.named_modules()]
    meant = {n for n in names if n.rsplit(".", 1)[-1] in ends and n not in slot.saved_modules}
    return ends if meant == set(slot.adapters) else sorted(slot.adapters)


def _head_modules(slot: Slot) -> list[str]:
    """The modules of transformers' classifier that are trained in full as the slot's head."""
    if slot.head is None:
        return []
    return [HEAD] if isinstance(slot.head, nn.Linear) else head_modules(slot.head)


def _token_indices(slot: Slot, bank: Bank) -> list[int] | dict[str, list[int]] | None:
    if slot.token_rows is None:
        return None
    ids = slot.token_rows.ids_K.tolist()
    if slot.token_rows.is_tied or slot.head is not None:
        return ids
    assert bank.output_name is not None
    return {bank.input_name: ids, bank.output_name: ids}


def _first(value: Any) -> int | None:
    return value[0] if isinstance(value, list | tuple) else value


def _conflict(found: str, fix: str) -> RecipeError:
    return RecipeError(f"method: {found}", "parts that peft can load together", fix)
