"""From what a model did on each held-out row to scores with intervals, and to "did it get better".

Every score but macro-F1 is a ratio of two sums over rows. Rows are the independent units: the turns of one conversation
share their `row` and are resampled together.

Shape legend: B resamples, N rows, K sums of a row, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.evaluate.intervals import bootstrap, sign_test, wilson
from luthier.types import NO_CLASS

Array = NDArray[np.float64]

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

MIN_ROWS_FOR_VERDICT = 6
"""With fewer pairs even a unanimous change has a two-sided sign test above 5% (2 / 2^5 = 6%)."""

# Each ratio's (numerator, denominator) among a row's sums, in the order of reports.
_SUMS = ("exact", "judged", "hits", "classed", "nll", "weight", "correct", "tokens")
_RATIOS = {
    "exact_match": ("exact", "judged"),
    "accuracy": ("hits", "classed"),
    "loss": ("nll", "weight"),
    "token_accuracy": ("correct", "tokens"),
}
_PROPORTIONS_OF_ROWS = ("exact_match", "accuracy")
_ORDER = ("exact_match", "accuracy", "macro_f1", "loss", "perplexity", "token_accuracy")


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

    @property
    def is_classed(self) -> bool:
        return self.class_index != NO_CLASS and self.predicted_class not in (None, NO_CLASS)


def summarize(scores: Sequence[RowScore], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Scores of one model, each as {"value", "low", "high", "rows"} with a 95% interval.

    - loss: sum of nll_sum over sum of weight_sum, in nats a token; perplexity: exp(loss), for token models only.
    - token_accuracy: correct supervised tokens over supervised tokens.
    - exact_match, accuracy: shares of scores; their interval is Wilson's, with rows for its n (so it is a little wide
      where rows have several turns). The others' is a bootstrap over rows.
    - macro_f1: mean over classes of 2tp / (2tp + fp + fn), over the classes that occur as truth or as prediction
      (Opitz & Burst, arXiv:1911.03347, "averaged F1").

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


def evaluation(models: Mapping[str, Sequence[RowScore]], seed: int = 0) -> dict[str, Any]:
    """The whole of eval.json from the scores of "base", "tuned" and, where judged, "base_3_shot" and the like.

    Returns:
        {"num_rows", one summary a model, "comparison": tuned against base, "groups": group -> model -> summary}; the
        last two only where there is something to say.
    """
    result: dict[str, Any] = {"num_rows": len({score.row for scores in models.values() for score in scores})}
    result.update({name: summarize(scores, seed) for name, scores in models.items()})
    if "base" in models and "tuned" in models:
        result["comparison"] = compare(models["base"], models["tuned"], seed)
    groups = sorted({score.group for scores in models.values() for score in scores if score.group is not None})
    if groups:
        result["groups"] = {
            group: {
                name: summarize([score for score in scores if score.group == group], seed)
                for name, scores in models.items()
            }
            for group in groups
        }
    return result


class _Sums:
    """Sums over the scores of each row, rows in ascending order, so that two models' rows line up."""

    def __init__(self, scores: Sequence[RowScore]) -> None:
        rows = sorted({score.row for score in scores})
        place = {row: n for n, row in enumerate(rows)}
        self.num_rows = len(rows)
        self.sums_NK = np.zeros((len(rows), len(_SUMS)))
        for score in scores:
            self.sums_NK[place[score.row]] += (
                bool(score.is_exact),
                score.is_exact is not None,
                score.is_classed and score.class_index == score.predicted_class,
                score.is_classed,
                score.nll_sum,
                score.weight_sum,
                score.num_correct_tokens,
                score.num_tokens,
            )
        classed = [score for score in scores if score.is_classed]
        names = {score.class_index for score in classed} | {int(score.predicted_class or 0) for score in classed}
        column = {name: c for c, name in enumerate(sorted(names))}
        self.hits_NC = np.zeros((len(rows), len(column)), dtype=np.float32)
        self.counted_NC = np.zeros_like(self.hits_NC)  # 2tp + fp + fn = times true + times predicted
        for score in classed:
            n, true, predicted = place[score.row], column[score.class_index], column[int(score.predicted_class or 0)]
            self.hits_NC[n, true] += true == predicted
            self.counted_NC[n, true] += 1
            self.counted_NC[n, predicted] += 1

    def _sum(self, name: str) -> Array:
        """A view [N] of one column of the sums."""
        return self.sums_NK[:, _SUMS.index(name)]

    def keep_shared(self, other: _Sums) -> None:
        """Forget, ratio by ratio, the rows on which `other` does not define it; both must hold the same rows."""
        for above, below in _RATIOS.values():
            is_lone_N = other._sum(below) <= 0
            for part in (above, below):
                self._sum(part)[is_lone_N] = 0.0

    def defined(self) -> list[str]:
        found = {name for name, (_, below) in _RATIOS.items() if self._sum(below).sum() > 0}
        if "loss" in found and "token_accuracy" in found:
            found.add("perplexity")
        if "accuracy" in found:
            found.add("macro_f1")
        return [name for name in _ORDER if name in found]

    def rows_behind(self, name: str) -> int:
        below = _RATIOS[{"perplexity": "loss", "macro_f1": "accuracy"}.get(name, name)][1]
        return int((self._sum(below) > 0).sum())

    def share(self, name: str) -> Array:
        """A ratio of each row by itself, [N]; 0 where the row does not define it."""
        above, below = (self._sum(part) for part in _RATIOS[name])
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def statistic(self, counts_BN: Array, names: Sequence[str]) -> Array:
        """The named metrics of B samples that hold each row `counts_BN` times: values_BK, NaN where undefined."""
        totals_BK = counts_BN @ self.sums_NK
        values = []
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for name in names:
                if name == "macro_f1":
                    values.append(self._macro_f1(counts_BN))
                    continue
                above, below = _RATIOS["loss" if name == "perplexity" else name]
                ratio_B = totals_BK[:, _SUMS.index(above)] / totals_BK[:, _SUMS.index(below)]
                values.append(np.exp(ratio_B) if name == "perplexity" else ratio_B)
        return np.stack(values, axis=1) if values else np.zeros((counts_BN.shape[0], 0))

    def _macro_f1(self, counts_BN: Array) -> Array:
        counts32_BN = counts_BN.astype(np.float32)  # exact up to 2^24 rows
        hits_BC, counted_BC = counts32_BN @ self.hits_NC, counts32_BN @ self.counted_NC
        f1_BC = np.divide(2 * hits_BC, counted_BC, out=np.zeros_like(hits_BC), where=counted_BC > 0)
        return (f1_BC.sum(axis=1) / (counted_BC > 0).sum(axis=1)).astype(np.float64)


def _verdict(name: str, before: float, after: float, is_clear: bool) -> str:
    if math.isfinite(before) != math.isfinite(after):
        return BETTER if math.isfinite(after) else WORSE  # a model whose loss is no number is broken
    if not is_clear:
        return UNCLEAR
    return BETTER if (after < before) == (name in LOWER_IS_BETTER) else WORSE


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
