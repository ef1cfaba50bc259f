"""Judging entities: an entity is right when its type and both its ends are, as seqeval counts (CoNLL's measure).

    precision = right / predicted,  recall = right / true,  F1 = 2 right / (predicted + true)

over the entities of all rows. The entities of a row of tags are those that seqeval finds.
"""

from __future__ import annotations

from collections.abc import Sequence

Ratios = dict[str, tuple[float, float]]
Entities = set[tuple[str, int, int]]
"""(type, first word, last word)."""


def entities(tags: Sequence[str]) -> Entities:
    """The entities of one row, found by seqeval."""
    from seqeval.metrics.sequence_labeling import get_entities

    return {(str(label), int(first), int(last)) for label, first, last in get_entities(list(tags))}


def ratios(predicted: Entities, true: Entities) -> Ratios:
    """What one row adds above and below the line of each measure."""
    num_right, num_predicted, num_true = len(predicted & true), len(predicted), len(true)
    return {
        "f1": (2.0 * num_right, float(num_predicted + num_true)),
        "precision": (float(num_right), float(num_predicted)),
        "recall": (float(num_right), float(num_true)),
    }


def ratios_by_type(predicted: Entities, true: Entities) -> dict[str, Ratios]:
    """The same for each type that occurs in the row."""
    labels = sorted({label for label, _, _ in predicted | true})
    return {label: ratios(_of_type(predicted, label), _of_type(true, label)) for label in labels}


def _of_type(found: Entities, label: str) -> Entities:
    return {entity for entity in found if entity[0] == label}
