"""Preferences: which of two replies to one prompt is the better, learnt without a reward model.

Shapes: M pairs, Q supervised positions of theirs.

Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7), with label smoothing as in conservative
DPO (Mitchell 2023, "A note on DPO with noisy preferences"):

    h = (log p(chosen) - log p(rejected)) - (log p_ref(chosen) - log p_ref(rejected))
    loss = -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)

log p of a side is the sum over its reply's tokens, given the prompt. beta h is the difference of the two implicit
rewards. The reference is fixed, so its half of h is a number that is computed once, before training. The loss is a
pair's: a job's mean is over the pairs of its whole optimizer batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

ROUNDING = 1e-5
"""Rewards this close are equal: log-probabilities are sums of hundreds of nats in float32, and training begins where
model and reference are one."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """Attributes:
    loss_M: float64; differentiable while training.
    logprobs_M2: float64. log p of the chosen and of the rejected side, in nats.
    reward_margin_M: float64. The implicit reward of the chosen side less the rejected one's.
    """

    loss_M: Tensor
    logprobs_M2: Tensor
    reward_margin_M: Tensor


def side_logprobs(nll_Q: Tensor, side_Q: Tensor, num_pairs: int) -> Tensor:
    """float64 [M, 2]: log-probabilities of the sides, summed from the negative ones of their tokens.

    Args:
        side_Q: 2m for the chosen side of pair m, 2m + 1 for the rejected one.
    """
    # A side is hundreds of nats, and the loss turns on a difference of few.
    wide_Q = nll_Q.double()
    return -wide_Q.new_zeros(2 * num_pairs).index_add(0, side_Q, wide_Q).view(num_pairs, 2)


def preference_loss(logprobs_M2: Tensor, reference_M: Tensor, beta_M: Tensor, smoothing_M: Tensor) -> PairScores:
    """The formulas above.

    Args:
        reference_M: log p_ref(chosen) - log p_ref(rejected).
    """
    reward_margin_M = beta_M * (logprobs_M2[:, 0] - logprobs_M2[:, 1] - reference_M)
    right_M, wrong_M = F.logsigmoid(reward_margin_M), F.logsigmoid(-reward_margin_M)
    return PairScores(-(1 - smoothing_M) * right_M - smoothing_M * wrong_M, logprobs_M2, reward_margin_M)


def prefers_chosen(reward_margin_M: Tensor) -> Tensor:
    """float64 [M]: 1 where the chosen side has the larger implicit reward, 0 where the rejected, 1/2 where neither."""
    return 0.5 + 0.5 * reward_margin_M.detach().double().sign() * (reward_margin_M.detach().abs() > ROUNDING)
