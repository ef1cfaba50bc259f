"""Choosing tokens from logits."""

from __future__ import annotations

import pytest
import torch

from luthier.engine.choose import choose
from luthier.engine.request import SamplingParams

PROBABILITIES = (0.5, 0.25, 0.15, 0.07, 0.03)


def frequencies(params: SamplingParams, num_draws: int = 4000, vocabulary: int = 5) -> list[float]:
    """How often each token is drawn, position after position."""
    logits_V = torch.full((vocabulary,), -1e9)
    logits_V[:5] = torch.tensor(PROBABILITIES).log()
    choices = choose(logits_V.expand(num_draws, -1), [params] * num_draws, range(num_draws))
    tokens = torch.tensor([choice.token for choice in choices])
    return (torch.bincount(tokens, minlength=5)[:5] / num_draws).tolist()


def test_draws_follow_the_probabilities() -> None:
    assert frequencies(SamplingParams(temperature=1.0)) == pytest.approx(PROBABILITIES, abs=0.03)


def test_temperature_sharpens() -> None:
    squares = [p**2 for p in PROBABILITIES]
    expected = [square / sum(squares) for square in squares]
    assert frequencies(SamplingParams(temperature=0.5)) == pytest.approx(expected, abs=0.03)
    assert frequencies(SamplingParams(temperature=1e-30)) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("vocabulary", [5, 1000])
def test_top_p_keeps_the_smallest_set_that_suffices(vocabulary: int) -> None:
    # 0.5 + 0.25 is short of 0.8; with 0.15 it suffices.
    expected = [p / 0.9 for p in PROBABILITIES[:3]]
    drawn = frequencies(SamplingParams(temperature=1.0, top_p=0.8), vocabulary=vocabulary)
    assert drawn[:3] == pytest.approx(expected, abs=0.03)
    assert drawn[3:] == [0, 0]
    assert frequencies(SamplingParams(temperature=1.0, top_p=0.01), 100)[0] == 1


def test_a_nucleus_larger_than_the_first_candidates() -> None:
    logits_PV = torch.zeros(3000, 1000)  # 900 of 1000 equal tokens are needed
    params = [SamplingParams(temperature=1.0, top_p=0.9)] * 3000
    tokens = {choice.token for choice in choose(logits_PV, params, range(3000))}
    assert 700 < len(tokens) <= 901


def test_rows_do_not_touch_each_other() -> None:
    logits_PV = torch.randn(6, 400, generator=torch.Generator().manual_seed(0)) * 2
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.7, top_p=0.5, seed=4, num_logprobs=2),
        SamplingParams(temperature=5.0, top_p=0.99, seed=5),
        SamplingParams(num_logprobs=0),
        SamplingParams(temperature=1.0, seed=3),
    ]
    positions = [5, 6, 7, 8, 9, 6]
    together = choose(logits_PV, params, positions)
    for row, choice in enumerate(together):
        alone = choose(logits_PV[row : row + 1], [params[row]], [positions[row]])[0]
        assert (alone.token, alone.is_finite) == (choice.token, choice.is_finite)
        assert (alone.logprob is None) == (params[row].num_logprobs is None)
        if alone.logprob is not None:
            assert choice.logprob is not None
            assert choice.logprob.logprob == pytest.approx(alone.logprob.logprob)
            assert [token for token, _ in choice.logprob.top] == [token for token, _ in alone.logprob.top]
    assert together[0].token == int(logits_PV[0].argmax())


def test_logits_that_are_no_numbers_are_told() -> None:
    logits_PV = torch.zeros(3, 10)
    logits_PV[1, 4] = float("nan")
    params = [SamplingParams(temperature=1.0)] * 3
    assert [choice.is_finite for choice in choose(logits_PV, params, [0, 0, 0])] == [True, False, True]


def test_half_precision_logits() -> None:
    logits_PV = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = [SamplingParams(num_logprobs=1)] * 2
    for row, choice in enumerate(choose(logits_PV, params, [0, 0])):
        expected = logits_PV[row].float().log_softmax(-1).max()
        assert choice.logprob is not None
        assert choice.logprob.logprob == pytest.approx(float(expected), abs=1e-6)


def test_draws_over_many_blocks_of_the_vocabulary() -> None:
    logits_V = torch.full((1000,), -float("inf"))
    likely = {0: 0.1, 255: 0.2, 256: 0.3, 700: 0.25, 999: 0.15}
    for token, probability in likely.items():
        logits_V[token] = torch.tensor(probability).log()
    params = [SamplingParams(temperature=1.0, seed=2)] * 4000
    tokens = [choice.token for choice in choose(logits_V.expand(4000, -1), params, range(4000))]
    assert {token: tokens.count(token) / 4000 for token in set(tokens)} == pytest.approx(likely, abs=0.03)
