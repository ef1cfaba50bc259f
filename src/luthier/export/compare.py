"""What a slot and a transformers model say on the same sequences, and how far apart they are.

Shapes: L tokens of a sequence, V vocabulary, C classes. Logits are [L, V] a sequence; those of a classifier [C], those
of a tagger [L, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.base.load import Base
from luthier.engine.heads import read_classes
from luthier.engine.own import OwnSlot
from luthier.engine.pack import PackItem, pack
from luthier.engine.slot import Slot
from luthier.types import Example

Tokens = NDArray[np.int32]


def random_sequences(
    lengths: Sequence[int], top: int, *, include: Sequence[int] = (), avoid: int | None = None, seed: int = 20
) -> list[Tokens]:
    """Sequences of random tokens below `top`.

    Args:
        lengths: In tokens.
        include: Tokens that stand at every other place, so that each occurs where there are places enough.
        avoid: A token that is left out, as padding, which a classifier's pooling passes over.
    """
    random = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        tokens = random.integers(0, top, size=length)
        tokens[tokens == avoid] = 0 if avoid else 1
        if include:
            places = np.arange(0, length, 2)
            tokens[places] = np.resize(np.asarray(sorted(include)), places.size)
        sequences.append(tokens.astype(np.int32))
    return sequences


@torch.inference_mode()
def slot_logits(base: Base, slot: Slot | OwnSlot, sequences: Sequence[Tokens]) -> list[Tensor]:
    """The engine's logits of a slot, all sequences in one forward."""
    batch = pack([PackItem(_example(tokens), slot.index) for tokens in sequences], base.device)
    routing = replace(base.routing(batch, training=False), head_segments=batch.segments)
    with base.bank.routed(routing):
        if slot.head is not None:
            hidden_TD = base.forward(batch).hidden_TD
            if slot.spec.head == "token":
                return list(read_classes(slot.head, hidden_TD).split(list(batch.lengths)))
            return list(read_classes(slot.head, hidden_TD[base.reads_at(batch)]))
        result = base.forward(batch, keep=torch.arange(batch.num_tokens, device=base.device))
    logits_TV = result.logits_PV
    if logits_TV is None:
        logits_TV = base.logits(result.hidden_TD, batch.segments)
    return list(logits_TV.split(list(batch.lengths)))


@torch.inference_mode()
def model_logits(model: Any, sequences: Sequence[Tokens], *, classifies: bool = False) -> list[Tensor]:
    """A transformers model's own logits, one sequence a forward; `classifies`: whether it is a sequence classifier."""
    logits = []
    for tokens in sequences:
        output = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(model.device))
        logits.append(output.logits[0])
        if classifies != (logits[-1].ndim == 1):
            raise ValueError(f"logits of shape {tuple(output.logits.shape)}")
    return logits


def distance(expected: Sequence[Tensor], found: Sequence[Tensor], columns: Tensor | None = None) -> float:
    """The worst sequence's root mean square difference, as a share of the spread of the expected logits.

    Args:
        columns: Compare these tokens alone; None compares all that `expected` has.

    Returns:
        0 for equal logits; NaN where one holds NaN or an infinity.
    """
    return max(map(_distance, expected, found, [columns] * len(expected)), key=lambda far: (far != far, far))


def _distance(want: Tensor, have: Tensor, columns: Tensor | None) -> float:
    if columns is None:
        columns = torch.arange(want.shape[-1])
    want, have = want[..., columns].double(), have[..., columns].double()
    spread = (want - want.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    off = (want - have).square().mean().sqrt()
    return float(off / spread) if float(off) != 0.0 else 0.0


def _example(tokens: Tokens) -> Example:
    return Example(tokens, np.zeros(tokens.size, dtype=np.float32), class_index=0)
