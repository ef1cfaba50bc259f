"""Judging preferences: what a model's log-probabilities of the two replies say.

- preference_accuracy: share of pairs whose implicit reward margin, beta times the change of log p(chosen) - log
  p(rejected) since training began, is above 0. A margin of exactly 0 counts as half: the reference itself has 50%.
- reward_margin: the mean of that margin (Rafailov et al. 2023, arXiv:2305.18290, section 5).
- ranking_accuracy: share of pairs in which the model itself finds the chosen reply the likelier (Chen et al. 2024,
  arXiv:2405.19534), which needs no reference; long replies are at a disadvantage in it.
"""

from __future__ import annotations

PREFERENCE_ACCURACY, REWARD_MARGIN, RANKING_ACCURACY = "preference_accuracy", "reward_margin", "ranking_accuracy"
PAIR_METRICS = (PREFERENCE_ACCURACY, REWARD_MARGIN, RANKING_ACCURACY)


def pair_ratios(chosen_logprob: float, rejected_logprob: float, reward_margin: float) -> dict[str, tuple[float, float]]:
    """What one pair adds to each metric, as (above, below) of a ratio."""
    return {
        PREFERENCE_ACCURACY: (_share_above_0(reward_margin), 1.0),
        REWARD_MARGIN: (reward_margin, 1.0),
        RANKING_ACCURACY: (_share_above_0(chosen_logprob - rejected_logprob), 1.0),
    }


def _share_above_0(value: float) -> float:
    return 0.5 if value == 0 else float(value > 0)
