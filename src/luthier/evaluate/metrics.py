"""From what a model did on each held-out row to scores with intervals, and to "did it get better".

Every score is a formula over sums over rows: most are a ratio of two, macro-F1 is of the counts of each class, chrF and
BLEU are of n-gram counts. Rows are the independent units: the turns of one conversation share their `row` and are
resampled together.

Shape legend: B resamples, N rows, K sums of a row or metrics, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.evaluate.corpus import FORMULAS
from luthier.evaluate.intervals import bootstrap, sign_test, wilson
from luthier.types import NO_CLASS

Array = NDArray[np.float64]

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

MIN_ROWS_FOR_VERDICT = 6
"""With fewer pairs even a unanimous change has a two-sided sign test above 5% (2 / 2^5 = 6%)."""

_PROPORTIONS_OF_ROWS = (
    *("exact_match", "accuracy", "subset_accuracy"),
    *("preference_accuracy", "ranking_accuracy", "valid"),
)
_ORDER = (
    *("f1", "precision", "recall", "chrf", "bleu", "valid", "bars_fit", "key_agreement", "iou"),
    *("preference_accuracy", "reward_margin", "ranking_accuracy"),
    *("exact_match", "accuracy", "micro_f1", "macro_f1", "subset_accuracy", "loss", "perplexity", "token_accuracy"),
)
"""Of metrics in eval.json; others follow by name."""
_DERIVED = {"perplexity": "loss", "macro_f1": "accuracy"}
"""Metric -> the one whose rows it is over."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """What one model did on one held-out example.

    Attributes:
        row: Index of the source record; several scores may share one.
        nll_sum: Sum of weight x negative log-likelihood, in nats. For a sequence head, the cross-entropy.
        weight_sum: Sum of those weights; 1 for a sequence head.
        num_correct_tokens: Supervised tokens that greedy next-token prediction got right.
        num_tokens: Supervised tokens; 0 for a sequence head.
        reply: The generated reply, or None where none was generated.
        reference: The reply or label that counts as right.
        is_exact: Whether the reply equals the reference; None where none was generated.
        class_index: The true class, or `NO_CLASS`.
        predicted_class: The class chosen by the model; None or `NO_CLASS` where there is no head.
        group: A name of the row's kind, for a breakdown; None for none.
        is_right: Whether the reply is right as a whole, for reports; None leaves it to the two above.
        ratios: Further metric -> (above, below): its score is the sum of the one over the sum of the other.
        statistics: Metric of a corpus -> the sums that `evaluate.corpus` computes it from.
        parts: Kind of thing within the row -> its own ratios, for a breakdown.
        reference_ratios: What the reference itself would score, where that is not 1 by definition.
    """

    row: int
    nll_sum: float = 0.0
    weight_sum: float = 0.0
    num_correct_tokens: int = 0
    num_tokens: int = 0
    reply: str | None = None
    reference: str | None = None
    is_exact: bool | None = None
    class_index: int = NO_CLASS
    predicted_class: int | None = None
    group: str | None = None
    is_right: bool | None = None
    ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)
    statistics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    reference_ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def is_classed(self) -> bool:
        return self.class_index != NO_CLASS and self.predicted_class not in (None, NO_CLASS)


def summarize(scores: Sequence[RowScore], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Scores of one model, each as {"value", "low", "high", "rows"} with a 95% interval.

    - loss: sum of nll_sum over sum of weight_sum, in nats a token; perplexity: exp(loss), for token models only.
    - token_accuracy: correct supervised tokens over supervised tokens.
    - exact_match, accuracy, preference_accuracy, ranking_accuracy: shares of scores; their interval is Wilson's, with
      rows for its n (so it is a little wide where rows have several turns). The others' is a bootstrap over rows.
    - macro_f1: mean over classes of 2tp / (2tp + fp + fn), over the classes that occur as truth or as prediction
      (Opitz & Burst, arXiv:1911.03347, "averaged F1"). Where rows have several labels, of their counts.
    - f1, precision, recall and other ratios; chrf and bleu: as the task defines them.

    A metric that no row defines is absent; "value" is None where it is not finite.
    """
    if not scores:
        return {}
    sums = _Sums(scores)
    names = sums.defined()
    value_K = sums.statistic(np.ones((1, sums.num_rows)), names)[0]
    low_K, high_K = bootstrap(lambda counts_BN: sums.statistic(counts_BN, names), sums.num_rows, seed)
    summary = {}
    for k, name in enumerate(names):
        value, low, high = float(value_K[k]), float(low_K[k]), float(high_K[k])
        num_rows = sums.rows_behind(name)
        if name in _PROPORTIONS_OF_ROWS:
            low, high = wilson(value, num_rows)
        summary[name] = {
            "value": _finite(value),
            # Resampling loses rare classes, so a percentile interval of macro-F1 can miss its own value: widen to it.
            "low": _finite(min(low, value)),
            "high": _finite(max(high, value)),
            "rows": num_rows,
        }
    return summary


def compare(base: Sequence[RowScore], tuned: Sequence[RowScore], seed: int = 0) -> dict[str, dict[str, Any]]:
    """The paired difference tuned - base of every metric both have, on the rows both have.

    Returns:
        metric -> {"difference", "low", "high", "rows", "verdict"}; low and high are a 95% bootstrap over rows, drawing
        the same rows for both models. The verdict is "better" or "worse" only if that interval leaves out 0, at least
        `MIN_ROWS_FOR_VERDICT` rows were seen and, for shares of rows, an exact sign test agrees at 5%.
    """
    shared = {score.row for score in base} & {score.row for score in tuned}
    if not shared:
        return {}
    before = _Sums([score for score in base if score.row in shared])
    after = _Sums([score for score in tuned if score.row in shared])
    before.keep_shared(after)
    after.keep_shared(before)
    names = [name for name in before.defined() if name in after.defined()]

    def difference(counts_BN: Array) -> Array:
        return after.statistic(counts_BN, names) - before.statistic(counts_BN, names)

    once = np.ones((1, len(shared)))
    before_K, after_K = before.statistic(once, names)[0], after.statistic(once, names)[0]
    low_K, high_K = bootstrap(difference, len(shared), seed)
    comparison = {}
    for k, name in enumerate(names):
        num_rows = min(before.rows_behind(name), after.rows_behind(name))
        is_clear = num_rows >= MIN_ROWS_FOR_VERDICT and (low_K[k] > 0 or high_K[k] < 0)
        if is_clear and name in _PROPORTIONS_OF_ROWS:
            change_N = after.share(name) - before.share(name)
            is_clear = sign_test(int((change_N > 0).sum()), int((change_N < 0).sum())) < 0.05
        comparison[name] = {
            "difference": _finite(float(after_K[k] - before_K[k])),
            "low": _finite(float(low_K[k])),
            "high": _finite(float(high_K[k])),
            "rows": num_rows,
            "verdict": _verdict(name, float(before_K[k]), float(after_K[k]), is_clear),
        }
    return comparison


def evaluation(
    models: Mapping[str, Sequence[RowScore]], seed: int = 0, signatures: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The whole of eval.json from the scores of "base", "tuned" and, where judged, "base_3_shot" and the like.

    Args:
        signatures: Metric -> how it is computed, where there is more than one way.

    Returns:
        {"num_rows", one summary a model, "comparison": tuned against base, "groups": kind of row -> model -> summary,
        "parts": kind of thing within rows -> model -> summary, "reference": what the references themselves score,
        "signatures"}; all but the first two only where there is
        something to say.
    """
    result: dict[str, Any] = {"num_rows": len({score.row for scores in models.values() for score in scores})}
    result.update({name: summarize(scores, seed) for name, scores in models.items()})
    if "base" in models and "tuned" in models:
        result["comparison"] = compare(models["base"], models["tuned"], seed)
    groups = sorted({score.group for scores in models.values() for score in scores if score.group is not None})
    if len(groups) > 1:
        result["groups"] = {
            group: {
                name: summarize([score for score in scores if score.group == group], seed)
                for name, scores in models.items()
            }
            for group in groups
        }
    judged = [score for scores in models.values() for score in scores if score.reference_ratios]
    references = {score.row: RowScore(score.row, ratios=score.reference_ratios) for score in judged}
    if references:
        result["reference"] = summarize(list(references.values()), seed)
    if signatures:
        result["signatures"] = dict(signatures)
    parts = sorted({part for scores in models.values() for score in scores for part in score.parts})
    if parts:
        result["parts"] = {
            part: {name: summarize(_scores_of_part(scores, part), seed) for name, scores in models.items()}
            for part in parts
        }
    return result


def _scores_of_part(scores: Sequence[RowScore], part: str) -> list[RowScore]:
    return [RowScore(score.row, ratios=score.parts[part]) for score in scores if part in score.parts]


class _Sums:
    """Each metric's sums over the scores of each row, rows in ascending order, so that two models' rows line up."""

    def __init__(self, scores: Sequence[RowScore]) -> None:
        rows = sorted({score.row for score in scores})
        self._place = {row: n for n, row in enumerate(rows)}
        self.num_rows = len(rows)
        self._sums_NK: dict[str, Array] = {}
        self._has_N: dict[str, NDArray[np.bool_]] = {}
        for score in scores:
            for name, values in _metrics_of(score).items():
                self._add(name, self._place[score.row], values)
        self._count_classes([score for score in scores if score.is_classed])

    def _add(self, name: str, row: int, values: Sequence[float]) -> None:
        if name not in self._sums_NK:
            self._sums_NK[name] = np.zeros((self.num_rows, len(values)))
            self._has_N[name] = np.zeros(self.num_rows, dtype=bool)
        self._sums_NK[name][row] += values
        self._has_N[name][row] = True

    def _count_classes(self, classed: Sequence[RowScore]) -> None:
        names = {score.class_index for score in classed} | {int(score.predicted_class or 0) for score in classed}
        column = {name: c for c, name in enumerate(sorted(names))}
        self.hits_NC = np.zeros((self.num_rows, len(column)), dtype=np.float32)
        self.counted_NC = np.zeros_like(self.hits_NC)  # 2tp + fp + fn = times true + times predicted
        for score in classed:
            n = self._place[score.row]
            true, predicted = column[score.class_index], column[int(score.predicted_class or 0)]
            self.hits_NC[n, true] += true == predicted
            self.counted_NC[n, true] += 1
            self.counted_NC[n, predicted] += 1

    def keep_shared(self, other: _Sums) -> None:
        """Forget, metric by metric, the rows that `other` has no score of; both must hold the same rows."""
        for name, sums_NK in self._sums_NK.items():
            is_lone_N = ~other._has_N.get(name, np.zeros(self.num_rows, dtype=bool))
            sums_NK[is_lone_N] = 0.0
            self._has_N[name] = self._has_N[name] & ~is_lone_N

    def defined(self) -> list[str]:
        """The metrics with a value: a ratio needs something below its line."""
        found = {
            name
            for name, sums_NK in self._sums_NK.items()
            if (self._has_N[name].any() if name in FORMULAS else sums_NK[:, 1].sum() > 0)
            and not (name == "macro_f1" and sums_NK.sum() == 0)  # no label is given or true anywhere
        }
        if "loss" in found and "token_accuracy" in found:
            found.add("perplexity")
        if "accuracy" in found:
            found.add("macro_f1")
        return [name for name in _ORDER if name in found] + sorted(found - set(_ORDER))

    def rows_behind(self, name: str) -> int:
        return int(self._has_N[name if name in self._has_N else _DERIVED[name]].sum())

    def share(self, name: str) -> Array:
        """A ratio of each row by itself, [N]; 0 where the row does not define it."""
        above, below = self._sums_NK[name].T
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def statistic(self, counts_BN: Array, names: Sequence[str]) -> Array:
        """The named metrics of B samples that hold each row `counts_BN` times: values_BK, NaN where undefined."""
        values = []
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for name in names:
                if name == "macro_f1" and name not in self._sums_NK:
                    values.append(self._macro_f1(counts_BN))
                    continue
                totals_BK = counts_BN @ self._sums_NK[name if name in self._sums_NK else _DERIVED[name]]
                value_B = FORMULAS[name](totals_BK) if name in FORMULAS else totals_BK[:, 0] / totals_BK[:, 1]
                values.append(np.exp(value_B) if name == "perplexity" else value_B)
        return np.stack(values, axis=1) if values else np.zeros((counts_BN.shape[0], 0))

    def _macro_f1(self, counts_BN: Array) -> Array:
        counts32_BN = counts_BN.astype(np.float32)  # exact up to 2^24 rows
        hits_BC, counted_BC = counts32_BN @ self.hits_NC, counts32_BN @ self.counted_NC
        f1_BC = np.divide(2 * hits_BC, counted_BC, out=np.zeros_like(hits_BC), where=counted_BC > 0)
        return (f1_BC.sum(axis=1) / (counted_BC > 0).sum(axis=1)).astype(np.float64)


def _metrics_of(score: RowScore) -> dict[str, Sequence[float]]:
    """Metric -> the sums that one score adds to: (above, below) of a ratio, or the statistics of a corpus."""
    found: dict[str, Sequence[float]] = {}
    if score.is_exact is not None:
        found["exact_match"] = (score.is_exact, 1.0)
    if score.is_classed:
        found["accuracy"] = (score.class_index == score.predicted_class, 1.0)
    if score.weight_sum > 0:
        found["loss"] = (score.nll_sum, score.weight_sum)
    if score.num_tokens:
        found["token_accuracy"] = (score.num_correct_tokens, score.num_tokens)
    return found | dict(score.ratios) | dict(score.statistics)


def _verdict(name: str, before: float, after: float, is_clear: bool) -> str:
    if math.isfinite(before) != math.isfinite(after):
        return BETTER if math.isfinite(after) else WORSE  # a model whose loss is no number is broken
    if not is_clear:
        return UNCLEAR
    return BETTER if (after < before) == (name in LOWER_IS_BETTER) else WORSE


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
