"""A linear model on the rows of a scenario: the reference for a target that a tuned model missed.

    python benchmarks/linear.py --data DIR sec_filings pubmedqa banking77

Logistic regression by scikit-learn: for classification and for questions with a fixed choice of answers over TF-IDF of
words and pairs of words, for tagging over each word with its neighbours, tag by tag from left to right. How strong it
is regularized is chosen on a fifth of the training rows; the test rows are scored once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scenario_search import Work
from scenarios import METRICS, find_set, read_records, recipe_of
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""The inverse of the penalty, scikit-learn's C."""

Score = Callable[[Sequence[Any], Sequence[Any], float], float]
"""(training records, records to judge, inverse penalty) to the metric."""


def main() -> None:
    """Print a line a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="SET")
    parser.add_argument("--data", required=True, help="the folder with the sets")
    options = parser.parse_args()
    print("| set | metric | linear model | inverse penalty |\n|---|---|---|---|")
    for name in options.sets:
        folder = find_set(options.data, name)
        if folder is None:
            sys.exit(f"there is no folder {options.data}/*/{name} with train.jsonl and test.jsonl")
        recipe = recipe_of(Work(name, "recipe", False), folder, Path("runs/linear"), [])
        train, test = (read_records(recipe, path) for path in (recipe.data.train, recipe.data.validation))
        metric, score = _scorer(recipe.task)
        fifth = len(train) // 5
        best = max(STRENGTHS, key=lambda strength: score(train[fifth:], train[:fifth], strength))
        print(f"| {name} | {metric} | {100 * score(train, test, best):.1f}% | {best:g} |", flush=True)


def _scorer(config: Any) -> tuple[str, Score]:
    if config.type == "classification" and not config.multiple:
        return METRICS["classification"], lambda *given: _accuracy(*given, lambda r: r.text, lambda r: r.label)
    if config.type == "qa" and config.choices:
        ask = lambda r: f"{r.context}\n{r.question}"  # noqa: E731
        return "accuracy", lambda *given: _accuracy(*given, ask, lambda r: r.answers[0])
    if config.type == "tagging":
        return METRICS["tagging"], lambda *given: _entity_f1(config, *given)
    sys.exit(f"a linear model needs classification, tagging or questions with choices, and this is {config.type}")


def _accuracy(train: Sequence[Any], held_out: Sequence[Any], strength: float, text_of: Any, label_of: Any) -> float:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=strength, max_iter=1000))
    model.fit([text_of(record) for record in train], [label_of(record) for record in train])
    found = model.predict([text_of(record) for record in held_out])
    return sum(a == label_of(record) for a, record in zip(found, held_out, strict=True)) / len(held_out)


def _entity_f1(config: Any, train: Sequence[Any], held_out: Sequence[Any], strength: float) -> float:
    from luthier.tasks.registry import task_for
    from luthier.tasks.tagging.schema import Tags

    task = task_for(config)
    task = task.with_labels(sorted({label for record in train for label in task.labels_of(record)}))
    features, tags = [], []
    for record in train:
        known = _tags_of(record)
        words = _words_of(record)
        features += [_features(words, at, known[at - 1] if at else "") for at in range(len(words))]
        tags += known
    model = make_pipeline(DictVectorizer(), LogisticRegression(C=strength, max_iter=300))
    model.fit(features, tags)
    above = below = 0.0
    for record in held_out:
        words, found = _words_of(record), []
        for at in range(len(words)):
            found.append(str(model.predict([_features(words, at, found[-1] if found else "")])[0]))
        ratio = task.mark(record, Tags(tuple(found), (1.0,) * len(found))).ratios["f1"]
        above, below = above + ratio[0], below + ratio[1]
    return above / below


def _words_of(record: Any) -> list[str]:
    return [record.text[start:end] for start, end in record.words]


def _tags_of(record: Any) -> list[str]:
    tags = ["O"] * len(record.words)
    for span in record.spans:
        inside = [index for index, (a, b) in enumerate(record.words) if span.start <= a and b <= span.end]
        for index in inside:
            tags[index] = f"{'B' if index == inside[0] else 'I'}-{span.label}"
    return tags


def _features(words: Sequence[str], at: int, before: str) -> dict[str, bool]:
    """What a tagger without a language model sees of a word: it, its shape, its ends, two neighbours a side, the tag
    before."""
    word = words[at]
    found = {
        f"tag before: {before}",
        f"ends: {word[-3:].lower()}",
        f"begins: {word[:3].lower()}",
        f"capital: {word[:1].isupper()}, all: {word.isupper()}, digits: {any(map(str.isdigit, word))}",
    }
    for offset in range(-2, 3):
        other = words[at + offset] if 0 <= at + offset < len(words) else ""
        found |= {f"{offset}: {other.lower()}", f"{offset} capital: {other[:1].isupper()}"}
    return dict.fromkeys(sorted(found), True)


if __name__ == "__main__":
    main()
