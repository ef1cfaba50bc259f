"""Which rows of a packed batch need computing at all.

Shapes: T rows of the batch, U of them computed, N sequences, L tokens of one sequence.

Two kinds of rows need not be:

- A row that begins its sequence just as another sequence of the same slot begins: the base is causal, so both have the
  same hidden state. Sequences that share a system prompt, or an instruction, compute it once. Gradients of all who
  read the row add up in it.
- A row after the last one that anything is read from, as a row's last token mostly is: it has no successor to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luthier.engine.pack import PackedBatch
from luthier.ops.cpu_attention import Member

MIN_SAVED = 0.01
"""A batch that would save less than this part of its rows runs as it is."""


@dataclass(frozen=True, slots=True)
class LiveRows:
    """The rows to compute, sorted by slot as the batch is.

    Attributes:
        source_U: int64. The batch's row that each stands for.
        row_of_T: int64. The computed row of each of the batch's rows; 0 for a row that nothing is read from.
        members: The computed rows of each sequence.
        first_at: Row bounds of the batch's slots -> where those begin or end among the computed rows.
    """

    source_U: Tensor
    row_of_T: Tensor
    members: tuple[Member, ...]
    first_at: dict[int, int]

    @property
    def num_rows(self) -> int:
        return int(self.source_U.shape[0])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence attends over."""
        return tuple(len(member.rows_L) for member in self.members)


def find_live_rows(
    batch: PackedBatch, *, only_scored: bool, class_of: Callable[[int], int] = lambda length: 0
) -> LiveRows | None:
    """The rows to compute, or None where that would save next to nothing. For batches on the CPU.

    Args:
        only_scored: Nothing but the rows of targets and of classes will be read.
        class_of: Sequence length -> a number; sequences of different numbers share nothing. (Under LongRoPE a
            sequence's length changes the angles of all its tokens.)
    """
    bounds = np.concatenate([[0], np.cumsum(batch.lengths)])
    live_N = _lengths_read(batch, bounds) if only_scored else np.asarray(batch.lengths)
    tokens_T = batch.tokens_T.numpy()
    source, members = [], []
    row_of_T = np.zeros(batch.num_tokens, dtype=np.int64)
    first_at: dict[int, int] = {}
    num_rows = 0
    for segment in batch.segments:
        first_at[segment.start] = num_rows
        first, last = np.searchsorted(bounds, (segment.start, segment.end))
        chosen = [n for n in range(first, last) if live_N[n] > 0]
        rows_of = {n: tokens_T[bounds[n] : bounds[n] + live_N[n]] for n in chosen}
        keys = {n: (class_of(batch.lengths[n]), rows_of[n].tolist()) for n in chosen}
        before: int | None = None
        for n in sorted(chosen, key=keys.__getitem__):  # who begins alike stands side by side
            shared = 0
            if before is not None and keys[n][0] == keys[before][0]:
                shared = _num_alike(rows_of[before], rows_of[n][:-1])
            start, length = bounds[n], len(rows_of[n])
            if before is not None:
                row_of_T[start : start + shared] = row_of_T[bounds[before] : bounds[before] + shared]
            row_of_T[start + shared : start + length] = np.arange(num_rows, num_rows + length - shared)
            source.append(np.arange(start + shared, start + length))
            members.append(Member(row_of_T[start : start + length], shared))
            num_rows += length - shared
            before = n
        first_at[segment.end] = num_rows
    if num_rows == 0 or num_rows > (1 - MIN_SAVED) * batch.num_tokens:
        return None
    return LiveRows(torch.from_numpy(np.concatenate(source)), torch.from_numpy(row_of_T), tuple(members), first_at)


def _lengths_read(batch: PackedBatch, bounds: np.ndarray) -> np.ndarray:
    """Tokens of each sequence up to the last one that is read."""
    read = np.concatenate([batch.target_at_P.numpy(), batch.class_at_C.numpy()])
    lengths_N = np.zeros(batch.num_sequences, dtype=np.int64)
    sequences = np.searchsorted(bounds, read, side="right") - 1
    np.maximum.at(lengths_N, sequences, read - bounds[sequences] + 1)
    return lengths_N


def _num_alike(left: np.ndarray, right: np.ndarray) -> int:
    """How many tokens two sequences have in common at their start."""
    shorter = min(len(left), len(right))
    differs = left[:shorter] != right[:shorter]
    return int(differs.argmax()) if differs.any() else shorter
