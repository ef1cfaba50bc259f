"""The fused output layer with its loss against the definition over logits.

Shapes: P supervised positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.objectives import language_modelling
from luthier.objectives.language_modelling import TokenScores, frozen_head_nll, next_token_nll_reference

D, V = 12, 40


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_reference(hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor) -> TokenScores:
    return next_token_nll_reference(F.linear(hidden_PD, weight_VD, bias_V), targets_P)


def value_and_gradient(
    compute: Callable[..., TokenScores], hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """nll_P, is_correct_P, and the hidden states' gradient under uneven weights, some of them 0."""
    hidden_PD = hidden_PD.clone().requires_grad_()
    scores = compute(hidden_PD, weight_VD, bias_V, targets_P)
    weights_P = torch.arange(len(targets_P), dtype=scores.nll_P.dtype) / 3
    (scores.nll_P * weights_P).sum().backward()
    assert hidden_PD.grad is not None
    return scores.nll_P.detach(), scores.is_correct_P, hidden_PD.grad


def assert_equals_reference(*given: Tensor | None, tolerance: float = 1e-11) -> None:
    found = value_and_gradient(frozen_head_nll, *given)  # type: ignore[arg-type]
    expected = value_and_gradient(by_reference, *given)  # type: ignore[arg-type]
    assert torch.equal(found[1], expected[1])
    for one, other in ((found[0], expected[0]), (found[2], expected[2])):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_positions", [1, 7, 8, 9, 16, 50])
@pytest.mark.parametrize("chunk_rows", [8, 13, 1000])
def test_value_and_gradient(
    chunk_rows: int, num_positions: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_modelling, "CHUNK_BYTES", 4 * V * chunk_rows)
    targets_P = torch.arange(num_positions) * 7 % V
    bias_V = draw(V, seed=3) if has_bias else None
    assert_equals_reference(draw(num_positions, D), draw(V, D, seed=1), bias_V, targets_P)


def test_a_chunk_holds_rows_however_large_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_modelling, "CHUNK_BYTES", 1)
    assert_equals_reference(draw(20, D), draw(V, D, seed=1), None, torch.arange(20))


@pytest.mark.parametrize("size", [1e3, 1e30, 1e150])
def test_extreme_logits(size: float) -> None:
    """A sum of exponentials that is not shifted by the largest overflows past 709."""
    hidden_PD, weight_VD = draw(9, D) * size, draw(V, D, seed=1)
    targets_P = F.linear(hidden_PD, weight_VD).argmax(dim=-1)
    targets_P[::2] = (targets_P[::2] + 1) % V
    nll_P, is_correct_P, grad_PD = value_and_gradient(frozen_head_nll, hidden_PD, weight_VD, None, targets_P)
    assert is_correct_P.tolist() == [False, True] * 4 + [False]
    assert bool(nll_P.isfinite().all())
    assert float(nll_P[1::2].max()) < 1e-6
    assert float(nll_P[::2].min()) > size / 1e3
    assert bool(grad_PD.isfinite().all())
    assert_equals_reference(hidden_PD, weight_VD, None, targets_P)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    scores = frozen_head_nll(torch.zeros(4, D), torch.randn(V, D), None, torch.arange(4))
    torch.testing.assert_close(scores.nll_P, torch.full((4,), math.log(V)))


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_modelling, "CHUNK_BYTES", 4 * V * 8)
    weight_VD, bias_V, targets_P = draw(V, 4, seed=1), draw(V, seed=2), torch.arange(10)
    hidden_PD = draw(10, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: frozen_head_nll(h, weight_VD, bias_V, targets_P).nll_P, (hidden_PD,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrower_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    given = draw(30, D, dtype=dtype), draw(V, D, seed=1, dtype=dtype), None, torch.arange(30)
    found = value_and_gradient(frozen_head_nll, *given)
    assert found[0].dtype == torch.float32
    assert found[2].dtype == dtype
    assert_equals_reference(*given, tolerance=tolerance)


def test_scoring_alone_keeps_nothing() -> None:
    with torch.no_grad():
        scores = frozen_head_nll(draw(5, D), draw(V, D, seed=1), None, torch.arange(5))
    assert not scores.nll_P.requires_grad
    torch.testing.assert_close(
        scores.nll_P, by_reference(draw(5, D), draw(V, D, seed=1), None, torch.arange(5)).nll_P, rtol=1e-11, atol=1e-11
    )


def test_a_head_that_is_not_a_number_says_so() -> None:
    hidden_PD = draw(3, D)
    hidden_PD[1] = float("nan")
    scores = frozen_head_nll(hidden_PD, draw(V, D, seed=1), None, torch.arange(3))
    assert scores.nll_P.isnan().tolist() == [False, True, False]
