"""What a method without a model reaches on a set: the figure that a tuned model has to beat."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.evaluate.corpus import FORMULAS
from luthier.tasks.art.guard import DrawingError
from luthier.tasks.art.raster import ink_of, iou
from luthier.tasks.task import Task

WORD = re.compile(r"\w+")


def naive_baseline(task: Task, train: Sequence[Any], test: Sequence[Any]) -> tuple[str, float] | None:
    """(what it is, its score) on the test records; None for tasks whose only baseline is the base model.

    - classification: multinomial naive Bayes over words; accuracy.
    - tagging: every longest run of words that is an entity of the training rows; entity F1.
    - translation: the source as it is; chrF.
    - qa with choices: the commonest answer of the training rows; accuracy.
    - art: one drawing for all rows, the ink that most training drawings have in common; IoU.
    """
    if task.name == "classification":
        return "naive Bayes", _naive_bayes([(r.text, r.label) for r in train], [(r.text, r.label) for r in test])
    if task.name == "tagging":
        return "lookup", _lookup(task, train, test)
    if task.name == "translation":
        sums_K = np.sum([task.mark(record, record.source).statistics["chrf"] for record in test], axis=0)
        return "copy", float(FORMULAS["chrf"](sums_K[None].astype(float))[0])
    if task.name == "qa" and getattr(task, "config").choices:  # noqa: B009 (the protocol has no config)
        answer = Counter(record.answers[0] for record in train).most_common(1)[0][0]
        return f"always {answer}", sum(record.answers[0] == answer for record in test) / len(test)
    if task.name == "art":
        return "mean drawing", _mean_drawing(getattr(task, "config").resolution, train, test)  # noqa: B009
    return None


def _mean_drawing(side: int, train: Sequence[Any], test: Sequence[Any]) -> float:
    """The mean of the training drawings' ink, cut at the share at which it is closest to the training drawings."""
    parts = []
    for records in (train, test):
        inks = [ink_of(record.svg, side) for record in records]
        parts.append([ink for ink in inks if not isinstance(ink, DrawingError)])
    known, asked = parts
    mean = np.mean(known, axis=0)

    def score(share: float, inks: Sequence[Any]) -> float:
        return sum(iou(mean >= share, ink) for ink in inks)

    share = max(np.unique(mean[mean > 0]), key=lambda share: score(share, known))
    return score(share, asked) / len(test)


def _naive_bayes(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> float:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    rows = Counter(label for _, label in train)
    for text, label in train:
        counts[label].update(WORD.findall(text.lower()))
    words = {word for counter in counts.values() for word in counter}
    totals = {label: sum(counter.values()) + len(words) for label, counter in counts.items()}

    def likelihood(label: str, text: str) -> float:
        known = (word for word in WORD.findall(text.lower()) if word in words)
        prior = math.log(rows[label] / len(train))
        return prior + sum(math.log((counts[label][word] + 1) / totals[label]) for word in known)

    return sum(max(rows, key=lambda c: likelihood(c, text)) == label for text, label in test) / len(test)


def _lookup(task: Task, train: Sequence[Any], test: Sequence[Any]) -> float:
    from luthier.tasks.tagging.schema import Tags

    known: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for record in train:
        for span in record.spans:
            inside = tuple(record.text[a:b] for a, b in record.words if span.start <= a and b <= span.end)
            known[inside][span.label] += 1
    longest = max(map(len, known), default=0)
    above = below = 0.0
    for record in test:
        words = [record.text[a:b] for a, b in record.words]
        tags, at = ["O"] * len(words), 0
        while at < len(words):
            most = min(longest, len(words) - at)
            size = next((n for n in range(most, 0, -1) if tuple(words[at : at + n]) in known), 0)
            if size:
                label = known[tuple(words[at : at + size])].most_common(1)[0][0]
                tags[at : at + size] = [f"B-{label}", *[f"I-{label}"] * (size - 1)]
            at += size or 1
        ratio = task.mark(record, Tags(tuple(tags), (1.0,) * len(tags))).ratios["f1"]
        above, below = above + ratio[0], below + ratio[1]
    return above / below
