"""Sequences of many jobs, laid out flat."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from luthier.engine.pack import BASE_SLOT, PackItem, Segment, pack
from luthier.types import NO_CLASS, Example


def example(tokens: list[int], weights: list[float], class_index: int = NO_CLASS) -> Example:
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32), class_index)


def test_layout_by_hand() -> None:
    batch = pack(
        [
            PackItem(example([10, 11, 12], [0, 0, 1]), slot=4, draw=(1, 2, 3)),
            PackItem(example([20, 21], [0, 0], class_index=6), slot=2),
            PackItem(example([30, 31, 32, 33], [0, 0.5, 0, 2]), slot=2, draw=(4, 5, 6)),
            PackItem(example([40], [0]), slot=BASE_SLOT),
        ]
    )
    assert batch.slots == (-1, 2, 2, 4)
    assert batch.lengths == (1, 2, 4, 3)
    assert batch.tokens_T.tolist() == [40, 20, 21, 30, 31, 32, 33, 10, 11, 12]
    assert batch.positions_T.tolist() == [0, 0, 1, 0, 1, 2, 3, 0, 1, 2]
    assert batch.offsets_N1.tolist() == [0, 1, 3, 7, 10]
    assert batch.offsets_N1.dtype == torch.int32
    assert batch.segments == (Segment(-1, 0, 1), Segment(2, 1, 7), Segment(4, 7, 10))
    # The state at one token predicts the next: "31" is predicted at "30", flat index 3.
    assert batch.target_at_P.tolist() == [3, 5, 8]
    assert batch.target_token_P.tolist() == [31, 33, 12]
    assert batch.target_weight_P.tolist() == [0.5, 2.0, 1.0]
    assert batch.target_rows_P.tolist() == [2, 2, 3]
    assert batch.target_segments == (Segment(2, 0, 2), Segment(4, 2, 3))
    assert batch.class_at_C.tolist() == [2]  # the last token of its sequence
    assert batch.class_index_C.tolist() == [6]
    assert batch.class_rows_C.tolist() == [1]
    assert batch.class_segments == (Segment(2, 0, 1),)
    assert batch.draws == ((0, 0, 0), (0, 0, 0), (4, 5, 6), (1, 2, 3))
    assert (batch.num_tokens, batch.num_sequences, batch.max_length) == (10, 4, 4)


def test_tags_lie_at_the_tokens_that_have_one() -> None:
    tags = np.array([NO_CLASS, 2, NO_CLASS, 0], np.int32)
    tagged = Example(np.array([10, 11, 12, 13], np.int32), np.zeros(4, np.float32), tags=tags)
    batch = pack([PackItem(tagged, 5), PackItem(example([20, 21], [0, 0], class_index=1), 3)])
    assert batch.class_at_C.tolist() == [1, 3, 5]
    assert batch.class_index_C.tolist() == [1, 2, 0]
    assert batch.class_rows_C.tolist() == [0, 1, 1]
    assert batch.class_segments == (Segment(3, 0, 1), Segment(5, 1, 3))


def test_no_loss_crosses_from_one_sequence_to_the_next() -> None:
    """A weight on a sequence's first token has nothing to be predicted from, and never reads its neighbour."""
    batch = pack([PackItem(example([1, 2], [1, 1]), 0), PackItem(example([3, 4], [1, 1]), 0)])
    assert batch.target_at_P.tolist() == [0, 2]
    assert batch.target_token_P.tolist() == [2, 4]


def test_items_of_one_slot_keep_their_order_whoever_stands_between() -> None:
    draw = random.Random(0)
    own = [PackItem(example([n], [0]), 3) for n in range(5, 15)]
    for _ in range(10):
        others = [PackItem(example([1, 2], [0, 1]), draw.choice([-1, 0, 7])) for _ in range(6)]
        mixed = list(own)
        for other in others:
            mixed.insert(draw.randint(0, len(mixed)), other)
        batch = pack(mixed)
        [segment] = [s for s in batch.segments if s.slot == 3]
        assert batch.tokens_T[segment.start : segment.end].tolist() == list(range(5, 15))


def test_nothing_supervised() -> None:
    batch = pack([PackItem(example([1, 2], [0, 0]), 0)])
    assert batch.target_at_P.numel() == 0
    assert batch.target_segments == ()
    assert batch.class_segments == ()


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack([])
    with pytest.raises(ValueError, match="without tokens"):
        pack([PackItem(example([], []), 0)])
