"""How sure a score is: intervals and tests over held-out rows, in plain numpy.

Shape legend: B resamples in a block, N rows (the independent units), K statistics computed together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
_Z = 1.959963984540054  # the normal quantile at (1 + CONFIDENCE) / 2
_BLOCK_ELEMENTS = 2_000_000  # resamples x rows drawn at once: 16 MB, whatever the number of rows


def wilson(proportion: float, num_rows: int) -> tuple[float, float]:
    """The 95% score interval of a proportion.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927):
    centre = (p + z²/2n) / (1 + z²/n), half width = z / (1 + z²/n) · sqrt(p(1-p)/n + z²/4n²).
    Unlike p ± z·sqrt(p(1-p)/n) it stays inside [0, 1] and is not empty at p = 0 or 1.

    Args:
        proportion: The share of successes, in [0, 1].
        num_rows: Independent rows behind it, at least 1.
    """
    if num_rows < 1:
        raise ValueError("an interval needs at least one row")
    shrink = 1.0 + _Z**2 / num_rows
    centre = (proportion + _Z**2 / (2 * num_rows)) / shrink
    spread = proportion * (1.0 - proportion) / num_rows + _Z**2 / (4 * num_rows**2)
    half = _Z / shrink * math.sqrt(max(spread, 0.0))
    return max(0.0, min(centre - half, proportion)), min(1.0, max(centre + half, proportion))


def bootstrap(
    statistic: Callable[[Array], Array], num_rows: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[Array, Array]:
    """95% percentile bootstrap intervals of K statistics, all from the same resamples.

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979): rows are drawn with
    replacement, as many as there are; the interval runs between the 2.5% and 97.5% quantiles of the statistic.

    Args:
        statistic: Takes how often each row was drawn, float64 counts_BN, and gives values_BK (NaN where undefined).
        num_rows: N.
        seed: Equal seeds and rows give equal resamples.

    Returns:
        low_K and high_K; NaN for a statistic that no resample defines.
    """
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // max(num_rows, 1))
    values = []
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn_BN = generator.integers(0, num_rows, size=(size, num_rows))
        drawn_BN += num_rows * np.arange(size)[:, None]
        counts = np.bincount(drawn_BN.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        values.append(statistic(counts.astype(np.float64)))
    values_RK = np.concatenate(values)
    tail = 100.0 * (1.0 - CONFIDENCE) / 2.0
    low_K, high_K = np.full(values_RK.shape[1], np.nan), np.full(values_RK.shape[1], np.nan)
    for k in range(values_RK.shape[1]):
        finite = values_RK[np.isfinite(values_RK[:, k]), k]
        if finite.size:
            low_K[k], high_K[k] = np.percentile(finite, [tail, 100.0 - tail])
    return low_K, high_K


def sign_test(num_up: int, num_down: int) -> float:
    """Two-sided p-value that as many rows truly rose as fell.

    McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12 (1947), in
    its exact binomial form; past 1000 changed rows its normal approximation with continuity correction.
    """
    num_changed = num_up + num_down
    if num_changed == 0:
        return 1.0
    fewer = min(num_up, num_down)
    if num_changed > 1000:
        z = max(abs(num_up - num_down) - 1, 0) / math.sqrt(num_changed)
        return math.erfc(z / math.sqrt(2.0))
    tail = sum(math.comb(num_changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**num_changed)
