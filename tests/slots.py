"""Slots with random values, as after training; their logits, and what peft computes from their files.

Shapes: L tokens of a sequence, V vocabulary, C classes or tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from packaging.version import Version
from torch import Tensor

from luthier.base.load import Base
from luthier.engine.pack import PackItem, pack
from luthier.engine.slot import Slot
from luthier.objectives.sequence_head import class_logits
from luthier.types import AdapterSpec, Example

Tokens = NDArray[np.int32]

HEADS_ARE_READ = Version(transformers.__version__) >= Version("5.18")
"""Before, transformers left the trained head of an adapter unread; peft reads it in every version."""
LENGTHS = (3, 17, 40)
"""Shorter and longer than the sliding window (24) and LongRoPE's short class (32) of the tiny Phi-3."""


def stirred(base: Base, spec: AdapterSpec, seed: int = 1) -> Slot:
    """A slot whose every parameter has moved from where it started."""
    slot = base.bank.add(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in slot.parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return slot


def random_sequences(lengths: Sequence[int], top: int, include: Sequence[int] = (), seed: int = 0) -> list[Tokens]:
    """Random token ids below `top`, with each of `include` somewhere among them, but not last."""
    random = np.random.default_rng(seed)
    sequences = [random.integers(0, top, size=length).astype(np.int32) for length in lengths]
    for index, token in enumerate(include):
        sequence = sequences[index % len(sequences)]
        sequence[random.integers(0, len(sequence) - 1)] = token
    return sequences


@torch.inference_mode()
def slot_logits(base: Base, slot: Slot, sequences: Sequence[Tokens]) -> list[Tensor]:
    """The slot's logits: [L - 1, V] of the tokens that have a next one; with a sequence head, [C] of each sequence.

    With a token head, [L, C].
    """
    weight = 0.0 if slot.head is not None else 1.0
    examples = [
        Example(tokens, np.r_[0.0, np.full(len(tokens) - 1, weight)].astype(np.float32), 0 if slot.head else -1)
        for tokens in sequences
    ]
    batch = pack([PackItem(example, slot.index) for example in examples])
    with base.bank.routed(base.routing(batch, training=False)):
        hidden_TD = base.forward(batch).hidden_TD
    if slot.head is not None and slot.spec.head == "token":
        logits_TC = class_logits(hidden_TD, slot.head.weight, slot.head.bias)
        return list(logits_TC.split([len(tokens) for tokens in sequences]))
    if slot.head is not None:
        return list(class_logits(hidden_TD[batch.class_at_C], slot.head.weight))
    logits = base.logits(hidden_TD[batch.target_at_P], batch.target_segments)
    return list(logits.split([len(tokens) - 1 for tokens in sequences]))


@torch.inference_mode()
def model_logits(model: Any, sequences: Sequence[Tokens], *, classifies: bool) -> list[Tensor]:
    """The same of a model of transformers or peft, one sequence at a time."""
    inputs = [torch.from_numpy(tokens.astype(np.int64))[None] for tokens in sequences]
    logits = [model(input_ids=ids, use_cache=False).logits[0] for ids in inputs]
    return logits if classifies else [logits_LV[:-1] for logits_LV in logits]


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], num_columns: int | None = None) -> float:
    """The largest relative 2-norm of a difference among the sequences, over the first `num_columns` logits."""
    pairs = [(our[..., :num_columns], their[..., :num_columns]) for our, their in zip(ours, theirs, strict=True)]
    return max(float((our - their).norm() / their.norm()) for our, their in pairs)


def sequences_for(spec: AdapterSpec, top: int = 300) -> list[Tokens]:
    """Random sequences in which every trained token occurs."""
    return random_sequences(LENGTHS, top, include=spec.new_tokens)


def peft_logits(
    base_folder: Path, adapter: Path, sequences: list[Tokens], *, num_tokens: int | None = None, dtype: str = "float64"
) -> list[Tensor]:
    """What peft computes over a fresh base.

    Args:
        num_tokens: Resize the vocabulary to this many first.
    """
    model, has_head = peft_model(base_folder, adapter, num_tokens=num_tokens, dtype=dtype)
    return model_logits(model, sequences, classifies=has_head)


def peft_model(
    base_folder: Path, adapter: Path, *, num_tokens: int | None = None, dtype: str = "float64"
) -> tuple[Any, bool]:
    """The adapter over a fresh base, by peft alone, and whether it classifies sequences or tokens."""
    from peft import PeftModel
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    classifies = (adapter / "classifier").exists()
    if classifies:
        config = AutoConfig.from_pretrained(adapter, subfolder="classifier")
        is_token = "TokenClassification" in config.architectures[0]
        kind = AutoModelForTokenClassification if is_token else AutoModelForSequenceClassification
        model = kind.from_pretrained(base_folder, config=config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    if num_tokens is not None:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval(), classifies
