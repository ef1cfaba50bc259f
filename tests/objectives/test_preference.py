"""Direct Preference Optimization: the loss and its gradient against the formulas written plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.objectives.preference import preference_loss, side_logprobs


def plain_loss(chosen: float, rejected: float, reference: float, beta: float, smoothing: float) -> float:
    """Equation 7 of arXiv:2305.18290, with the share of wrong labels of conservative DPO, in numpy."""
    reward = beta * (chosen - rejected - reference)
    return float((1 - smoothing) * np.log1p(np.exp(-reward)) + smoothing * np.log1p(np.exp(reward)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_equal_the_formulas(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    nll_Q = torch.rand(17, generator=generator, dtype=torch.float64).mul_(4).requires_grad_()
    side_Q = torch.tensor([0] * 3 + [1] * 2 + [2] * 4 + [3] * 1 + [4] * 5 + [5] * 2)
    reference_M, beta_M, smoothing_M = (
        torch.tensor(values, dtype=torch.float64) for values in ([0.5, -3.0, 2.0], [0.1, 0.5, 2.0], [smoothing] * 3)
    )
    scores = preference_loss(side_logprobs(nll_Q, side_Q, 3), reference_M, beta_M, smoothing_M)
    losses, rewards = scores.loss_M.tolist(), scores.reward_margin_M.tolist()
    for m in range(3):
        chosen = -float(nll_Q.detach()[side_Q == 2 * m].sum())
        rejected = -float(nll_Q.detach()[side_Q == 2 * m + 1].sum())
        assert scores.logprobs_M2[m].tolist() == pytest.approx([chosen, rejected], abs=1e-12)
        reward = float(beta_M[m]) * (chosen - rejected - float(reference_M[m]))
        assert rewards[m] == pytest.approx(reward, abs=1e-12)
        expected = plain_loss(chosen, rejected, float(reference_M[m]), float(beta_M[m]), smoothing)
        assert losses[m] == pytest.approx(expected, abs=1e-12)
    (grad_Q,) = torch.autograd.grad(scores.loss_M.sum(), nll_Q)
    # d loss / d reward = smoothing - sigmoid(-reward), and the chosen side's log-probability falls as its nll rises.
    slope_M = (smoothing - torch.sigmoid(-scores.reward_margin_M.detach())) * beta_M
    sign_Q = torch.where(side_Q % 2 == 0, -1.0, 1.0).double()
    torch.testing.assert_close(grad_Q, slope_M[side_Q // 2] * sign_Q, rtol=1e-12, atol=1e-12)


def test_a_model_that_equals_its_reference_loses_log_2() -> None:
    logprobs_M2 = torch.tensor([[-4.0, -9.0]]).double()
    one = torch.ones(1).double()
    scores = preference_loss(logprobs_M2, torch.tensor([5.0]).double(), 0.1 * one, 0.0 * one)
    assert float(scores.loss_M) == pytest.approx(np.log(2))
    assert float(scores.reward_margin_M) == 0.0


def test_long_sides_keep_a_small_difference() -> None:
    """Thousands of nats a side, in float32 from the base: the difference of their sums is not lost."""
    nll_Q = torch.full((8000,), 1.5, dtype=torch.float32)
    nll_Q[0] = 1.5 + 1e-4
    side_Q = torch.cat([torch.zeros(4000, dtype=torch.int64), torch.ones(4000, dtype=torch.int64)])
    logprobs_M2: Tensor = side_logprobs(nll_Q, side_Q, 1)
    assert float(logprobs_M2[0, 1] - logprobs_M2[0, 0]) == pytest.approx(1e-4, rel=1e-3)
