"""Scores of a whole corpus from sums over its rows, for many resamples at once.

Those of chrF and BLEU are sacrebleu's, as `tasks/translation/metrics.py` takes them. Shape: B resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CHRF_BETA = 2.0
"""How much more recall counts than precision (Popović 2016)."""


def chrf(sums_BK: Array) -> Array:
    """chrF, 0 to 100, as sacrebleu computes it without smoothing.

    Precision and recall are means over the orders of which both sides have n-grams; then
    F = (1 + beta^2) P R / (beta^2 P + R).

    Args:
        sums_BK: float64 [B, 3 x orders]. For each order the n-grams of the hypotheses, of the references, and of both.
    """
    found_BO, wanted_BO, both_BO = (sums_BK[:, k::3] for k in range(3))
    counts_BO = (found_BO > 0) & (wanted_BO > 0)
    num_orders_B = np.maximum(counts_BO.sum(axis=1), 1)
    precision_B = _quotient(both_BO, found_BO, counts_BO).sum(axis=1) / num_orders_B
    recall_B = _quotient(both_BO, wanted_BO, counts_BO).sum(axis=1) / num_orders_B
    weight = CHRF_BETA**2
    above_B = (1 + weight) * precision_B * recall_B
    return 100 * _quotient(above_B, weight * precision_B + recall_B, precision_B + recall_B > 0)


def bleu(sums_BK: Array) -> Array:
    """BLEU, 0 to 100, as sacrebleu computes it with exponential smoothing.

    The brevity penalty times the geometric mean of the n-gram precisions; an order without a hit counts as half, a
    quarter, ... of one, the more orders have none.

    Args:
        sums_BK: float64 [B, 2 + 2 x orders]. Length of the hypotheses and of the references, right n-grams an order,
            all n-grams an order.
    """
    num_orders = (sums_BK.shape[1] - 2) // 2
    length_B, wanted_B = sums_BK[:, 0], sums_BK[:, 1]
    right_BO, all_BO = sums_BK[:, 2 : 2 + num_orders], sums_BK[:, 2 + num_orders :]
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty_B = np.where(length_B < wanted_B, np.exp(1 - wanted_B / length_B), 1.0)
        halvings_BO = np.cumsum((right_BO == 0) & (all_BO > 0), axis=1)
        smoothed_BO = np.where(right_BO > 0, right_BO, 0.5**halvings_BO)
        precision_BO = 100 * smoothed_BO / all_BO
        # sacrebleu takes the logarithm of nothing as -9999999999: an order without n-grams makes the whole 0.
        mean_B = np.exp(np.where(all_BO > 0, np.log(precision_BO), -np.inf).sum(axis=1) / num_orders)
    return np.where((right_BO > 0).any(axis=1) & (length_B > 0), penalty_B * mean_B, 0.0)


def macro_f1(sums_BK: Array) -> Array:
    """The mean over labels of F1 = 2tp / (2tp + fp + fn), over the labels that are given or true somewhere.

    Args:
        sums_BK: float64 [B, 2 x labels]. For each label 2tp, and the times it is given plus the times it is true.
    """
    above_BL, below_BL = sums_BK[:, 0::2], sums_BK[:, 1::2]
    num_labels_B = (below_BL > 0).sum(axis=1)
    return _quotient(_quotient(above_BL, below_BL, below_BL > 0).sum(axis=1), num_labels_B, num_labels_B > 0)


def _quotient(above: Array, below: Array, where: NDArray[np.bool_]) -> Array:
    return np.divide(above, below, out=np.zeros_like(above), where=where)


FORMULAS: dict[str, Callable[[Array], Array]] = {"chrf": chrf, "bleu": bleu, "macro_f1": macro_f1}
"""Metric -> its formula over the sums of `RowScore.statistics`."""
