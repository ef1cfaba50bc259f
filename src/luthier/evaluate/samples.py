"""Which held-out replies a report shows, and which classes a classifier mixes up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.evaluate.summary import model_label

MAX_CHARACTERS = 3000
"""Of one text in a report; the rest is in predictions.jsonl."""

MAX_CONFUSED_PAIRS = 15

# Failures come first and get the most room: they say what to do next.
_OUTCOMES = (
    ("lost", "Right before, wrong now", 4),
    ("wrong", "Still wrong", 6),
    ("won", "Wrong before, right now", 5),
    ("kept", "Right before and now", 2),
    ("unjudged", "Replies", 8),
)


@dataclass(frozen=True, slots=True)
class Reply:
    """One model's reply in a sample: who, what, and whether it is right (None where nobody can say)."""

    label: str
    text: str
    is_correct: bool | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out row: its prompt, the right answer, and what each model said."""

    row: str
    prompt: str
    reference: str
    replies: list[Reply]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A kind of change, the number of rows it befell, and some of them."""

    name: str
    title: str
    num_rows: int
    samples: list[Sample]


def outcomes(predictions: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Rows by what tuning did to them, failures first, a few samples of each spread over the held-out rows."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for prediction in predictions:
        kinds.setdefault(_outcome(prediction), []).append(prediction)
    found = []
    for name, title, num_shown in _OUTCOMES:
        rows = kinds.get(name, [])
        if rows:
            places = np.unique(np.linspace(0, len(rows) - 1, min(num_shown, len(rows))).round().astype(int))
            found.append(Outcome(name, title, len(rows), [sample(rows[place]) for place in places]))
    return found


def sample(prediction: Mapping[str, Any]) -> Sample:
    """A line of predictions.jsonl as a report shows it."""
    names = [name for name in prediction if re.fullmatch(r"base|base_\d+_shots?|tuned", name)]
    names.sort(key=lambda name: (name == "tuned", name != "base", name))
    replies = [
        Reply(model_label(name), _cut(prediction[name]), _is_correct(prediction, name))
        for name in names
        if prediction[name] is not None
    ]
    return Sample(
        row=str(prediction.get("row", "")),
        prompt=_cut(prediction.get("prompt", "")),
        reference=_cut(prediction.get("reference", "")),
        replies=replies,
    )


def confusion(predictions: Sequence[Mapping[str, Any]], model: str = "tuned") -> tuple[list[str], NDArray[np.int64]]:
    """The classes that occur, sorted, and int64 [C, C] counts with the truth by row and the prediction by column."""
    pairs = Counter(
        (str(line["reference"]), str(line[model]))
        for line in predictions
        if line.get("reference") is not None and line.get(model) is not None
    )
    names = sorted({name for pair in pairs for name in pair})
    place = {name: index for index, name in enumerate(names)}
    matrix_CC = np.zeros((len(names), len(names)), dtype=np.int64)
    for (truth, predicted), count in pairs.items():
        matrix_CC[place[truth], place[predicted]] = count
    return names, matrix_CC


def most_mistaken(
    names: Sequence[str], matrix_CC: NDArray[np.int64], limit: int
) -> tuple[list[str], NDArray[np.int64]]:
    """The classes with the most mistakes, as truth or as prediction, in their order, and their part of the matrix."""
    if len(names) <= limit:
        return list(names), matrix_CC
    mistakes_C = matrix_CC.sum(axis=0) + matrix_CC.sum(axis=1) - 2 * np.diag(matrix_CC)
    kept = np.sort(np.argsort(-mistakes_C, kind="stable")[:limit])
    return [names[place] for place in kept], matrix_CC[np.ix_(kept, kept)]


def confused_pairs(names: Sequence[str], matrix_CC: NDArray[np.int64]) -> list[tuple[str, str, int, int]]:
    """The most frequent mistakes as (true, predicted, count, rows of the true class), most frequent first."""
    totals = matrix_CC.sum(axis=1)
    pairs = [
        (names[truth], names[predicted], int(matrix_CC[truth, predicted]), int(totals[truth]))
        for truth, predicted in np.argwhere(matrix_CC > 0)
        if truth != predicted
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:MAX_CONFUSED_PAIRS]


def _outcome(prediction: Mapping[str, Any]) -> str:
    before, after = prediction.get("base_correct"), prediction.get("tuned_correct")
    if not isinstance(after, bool):
        return "unjudged"
    if after:
        return "kept" if before is True else "won"
    return "lost" if before is True else "wrong"


def _is_correct(prediction: Mapping[str, Any], name: str) -> bool | None:
    judged = prediction.get(f"{name}_correct")
    return judged if isinstance(judged, bool) else None


def _cut(text: Any) -> str:
    text = str(text)
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}… ({len(text) - MAX_CHARACTERS:,} more characters)"
