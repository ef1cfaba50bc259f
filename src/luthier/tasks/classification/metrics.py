"""Judging classes: integer class indices, predicted and true, in equal order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    """The share of right predictions, 0 to 1.

    Raises:
        ValueError: for sequences of unequal length, or empty ones.
    """
    pairs = _pairs(predicted, true)
    return sum(p == t for p, t in pairs) / len(pairs)


def macro_f1(predicted: Sequence[int], true: Sequence[int]) -> float:
    """The mean over classes of F1 = 2 tp / (2 tp + fp + fn), 0 to 1, over the classes that occur in either sequence.

    Raises:
        ValueError: for sequences of unequal length, or empty ones.
    """
    pairs = _pairs(predicted, true)
    hits = Counter(t for p, t in pairs if p == t)
    num_predicted, num_true = Counter(p for p, _ in pairs), Counter(t for _, t in pairs)
    classes = sorted(num_predicted | num_true)
    # 2 tp + fp + fn is the number predicted plus the number true.
    return sum(2 * hits[c] / (num_predicted[c] + num_true[c]) for c in classes) / len(classes)


def _pairs(predicted: Sequence[int], true: Sequence[int]) -> list[tuple[int, int]]:
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} true classes")
    return [(int(p), int(t)) for p, t in zip(predicted, true, strict=True)]
