"""Examples of many jobs -> one flat batch, sorted by slot, without padding.

Shapes: T tokens, N sequences, P supervised positions, C positions with a class: the last token of a sequence whose
class or labels are learnt, and every tagged token of one whose tags are; K classes of a slot's head; M preference
pairs, Q supervised positions of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luthier.types import NO_CLASS, Example

BASE_SLOT = -1
"""The slot of sequences that run through the base without any adapter."""

NO_SIDE = -1
"""Of a supervised position that belongs to no pair."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of neighbours that belong to one slot: half-open bounds in some flat order."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PackItem:
    """One sequence, or one pair of them, on its way into a batch.

    Attributes:
        example: The tokens and what is learnt from them.
        slot: The slot it belongs to, or `BASE_SLOT`.
        draw: Key of its dropout masks: (job seed, optimizer step, example index). Company does not enter it. Both sides
            of a pair draw the same masks.
    """

    example: Example
    slot: int
    draw: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class PackedPairs:
    """The preference pairs of a batch. The two sides of a pair are neighbours, the chosen one first.

    Attributes:
        at_Q: int64. Which of the P supervised positions belong to pairs.
        side_Q: int64. Whose they are: 2m for the chosen side of pair m, 2m + 1 for the rejected one.
        beta_M, smoothing_M, reference_M: float64. As in `luthier.types.Pair`.
        chosen_rows: The sequence (0 to N-1) of each pair's chosen side.
        segments: Bounds of each slot within the M pairs.
    """

    at_Q: Tensor
    side_Q: Tensor
    beta_M: Tensor
    smoothing_M: Tensor
    reference_M: Tensor
    chosen_rows: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences of several jobs as the engine runs them.

    Attributes:
        tokens_T: int64. Token ids, sequence after sequence.
        positions_T: int64. Each token's position within its own sequence.
        offsets_N1: int32 [N + 1]. Token bounds of the sequences.
        lengths: Tokens of each sequence.
        slots: Slot of each sequence, ascending.
        draws: Dropout key of each sequence.
        segments: Token bounds of each slot.
        target_at_P: int64. Flat index of the token whose hidden state predicts the target.
        target_token_P: int64. The token to predict.
        target_weight_P: float32. Its loss weight; 0 where it counts through its pair.
        target_segments: Bounds of each slot within the P supervised positions.
        class_at_C: int64. Flat index of each token at whose hidden state a head reads a class.
        class_index_C: int64. That class; 0 where a head says any number of labels.
        class_segments: Bounds of each slot within the C positions.
        class_flags: float32 [C of the slot, K] for each of these segments whose head says any number of labels: 1 for a
            label that the sequence has. None for the other segments.
        class_rows, target_rows: The sequence (0 to N-1) of each class and of each supervised position.
        pairs: The preference pairs among the sequences, or None where there is none.
    """

    tokens_T: Tensor
    positions_T: Tensor
    offsets_N1: Tensor
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    draws: tuple[tuple[int, int, int], ...]
    segments: tuple[Segment, ...]
    target_at_P: Tensor
    target_token_P: Tensor
    target_weight_P: Tensor
    target_rows_P: Tensor
    target_segments: tuple[Segment, ...]
    class_at_C: Tensor
    class_index_C: Tensor
    class_rows_C: Tensor
    class_segments: tuple[Segment, ...]
    class_flags: tuple[Tensor | None, ...]
    pairs: PackedPairs | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.shape[0])

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths)


def pack(items: Sequence[PackItem], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay the items out flat, sorted by slot; items of one slot keep their order.

    The shift from "weight of token i" to "hidden state i-1 predicts token i" happens here and nowhere else.

    Raises:
        ValueError: for no items, or an empty example.
    """
    if not items:
        raise ValueError("a batch needs at least one sequence")
    items = sorted(items, key=lambda item: item.slot)
    lengths = [length for item in items for length in item.example.lengths]
    if min(lengths) == 0:
        raise ValueError("an example without tokens cannot be packed")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([item.example.tokens for item in items]).astype(np.int64)
    weights = np.concatenate([item.example.weights for item in items]).astype(np.float32)
    positions = np.concatenate([np.arange(length) for length in lengths])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    num_sequences = [len(item.example.lengths) for item in items]
    slots = np.repeat([item.slot for item in items], num_sequences)
    example_of_N = [item.example for item, count in zip(items, num_sequences, strict=True) for _ in range(count)]
    supervised = np.flatnonzero((weights > 0) & (positions > 0))
    classes = np.concatenate([_classes(item.example) for item in items])
    with_class = np.flatnonzero(classes != NO_CLASS)
    class_rows = rows[with_class]
    class_segments = segments_of(slots[class_rows])

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if torch.device(device).type == "cuda":  # from pinned memory, so that the copy does not wait for the device
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    pairs, side_P = _pairs(items, np.cumsum([0, *num_sequences[:-1]]), rows[supervised], put)
    return PackedBatch(
        tokens_T=put(tokens),
        positions_T=put(positions),
        offsets_N1=put(offsets.astype(np.int32)),
        lengths=tuple(lengths),
        slots=tuple(int(slot) for slot in slots),
        draws=tuple(item.draw for item in items for _ in item.example.lengths),
        segments=segments_of(slots[rows]),
        target_at_P=put(supervised - 1),
        target_token_P=put(tokens[supervised]),
        target_weight_P=put(np.where(side_P == NO_SIDE, weights[supervised], np.float32(0))),
        target_rows_P=put(rows[supervised]),
        target_segments=segments_of(slots[rows[supervised]]),
        class_at_C=put(with_class),
        class_index_C=put(classes[with_class].astype(np.int64)),
        class_rows_C=put(class_rows),
        class_segments=class_segments,
        class_flags=tuple(
            None if flags is None else put(flags)
            for flags in (_flags([example_of_N[row] for row in class_rows[s.start : s.end]]) for s in class_segments)
        ),
        pairs=pairs,
    )


def _pairs(
    items: Sequence[PackItem], first_rows: np.ndarray, rows_P: np.ndarray, put: Callable[[np.ndarray], Tensor]
) -> tuple[PackedPairs | None, np.ndarray]:
    """The pairs among the items, and the side that each supervised position belongs to, `NO_SIDE` for most.

    Args:
        first_rows: Each item's first sequence.
        rows_P: The sequence of each supervised position.
    """
    found = [(item, int(row)) for item, row in zip(items, first_rows, strict=True) if item.example.pair is not None]
    if not found:
        return None, np.full(rows_P.shape, NO_SIDE)
    side_of_row = np.full(int(first_rows[-1]) + 2, NO_SIDE)
    for m, (_, row) in enumerate(found):
        side_of_row[row : row + 2] = 2 * m, 2 * m + 1
    side_P = side_of_row[rows_P]
    at_Q = np.flatnonzero(side_P != NO_SIDE)
    pairs = [item.example.pair for item, _ in found]
    beta, smoothing, reference = np.array(
        [(pair.beta, pair.label_smoothing, pair.reference) for pair in pairs if pair is not None]
    ).T
    packed = PackedPairs(
        at_Q=put(at_Q),
        side_Q=put(side_P[at_Q]),
        beta_M=put(beta),
        smoothing_M=put(smoothing),
        reference_M=put(reference),
        chosen_rows=tuple(row for _, row in found),
        segments=segments_of(np.array([item.slot for item, _ in found])),
    )
    return packed, side_P


def _classes(example: Example) -> np.ndarray:
    """The class to be read at each token, `NO_CLASS` at most of them."""
    if example.tags is not None:
        return example.tags
    classes = np.full(example.num_tokens, NO_CLASS, dtype=np.int32)
    classes[-1] = 0 if example.class_flags is not None else example.class_index
    return classes


def _flags(examples: Sequence[Example]) -> np.ndarray | None:
    """float32 [C, K] of one slot's positions, or None where its head says one class."""
    flags = [example.class_flags for example in examples if example.class_flags is not None]
    return np.stack(flags).astype(np.float32) if flags else None


def segments_of(slots: np.ndarray | Sequence[int]) -> tuple[Segment, ...]:
    """The runs of equal slots among `slots`, each from its first place to the place after its last."""
    slots = np.asarray(slots)
    if slots.size == 0:
        return ()
    starts = np.flatnonzero(np.concatenate([[True], slots[1:] != slots[:-1]]))
    ends = np.concatenate([starts[1:], [slots.size]])
    return tuple(Segment(int(slots[s]), int(s), int(e)) for s, e in zip(starts, ends, strict=True))
