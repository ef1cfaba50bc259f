"""Judging classes (integer class indices, predicted and true, in equal order) and sets of labels.

Of sets, F1 is 2 right / (given + true): over all labels of all rows (micro), or of each label by itself, then the mean
over the labels that occur (macro).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet


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


Ratios = dict[str, tuple[float, float]]


def set_ratios(found: AbstractSet[str], true: AbstractSet[str]) -> Ratios:
    """What one text's labels add above and below the line of each measure."""
    num_right, num_found, num_true = len(found & true), len(found), len(true)
    return {
        "f1": (2.0 * num_right, float(num_found + num_true)),
        "precision": (float(num_right), float(num_found)),
        "recall": (float(num_right), float(num_true)),
    }


def set_ratios_by_label(found: AbstractSet[str], true: AbstractSet[str]) -> dict[str, Ratios]:
    """The same for each label that the text has or is given."""
    return {label: set_ratios(found & {label}, true & {label}) for label in sorted(found | true)}


def class_counts(found: AbstractSet[str], true: AbstractSet[str], labels: Sequence[str]) -> tuple[float, ...]:
    """What a text adds to the sums of macro-F1: for each label 2 if it is right, then how often it is given or true."""
    return tuple(
        value
        for label in labels
        for value in (2.0 * (label in found and label in true), float((label in found) + (label in true)))
    )
