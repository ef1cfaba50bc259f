"""The trained output layer in chunks against the definition over whole logits."""

from __future__ import annotations

import pytest
import torch

from luthier.objectives import language_modelling
from luthier.objectives.language_modelling import next_token_nll_reference
from luthier.objectives.trained_head import trained_head_nll

P, D, V = 37, 12, 50


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_and_all_three_gradients_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_bias: bool
) -> None:
    monkeypatch.setattr(language_modelling, "CHUNK_BYTES", 8 * 4 * V)  # chunks of 8 positions
    generator = torch.Generator().manual_seed(0)
    hidden_PD = torch.randn(P, D, generator=generator, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    bias_V = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True) if has_bias else None
    targets_P = torch.randint(V, (P,), generator=generator)
    upstream_P = torch.rand(P, generator=generator, dtype=dtype)
    leaves = [leaf for leaf in (hidden_PD, weight_VD, bias_V) if leaf is not None]
    expected = next_token_nll_reference(torch.nn.functional.linear(hidden_PD, weight_VD, bias_V), targets_P)
    wanted = torch.autograd.grad((expected.nll_P * upstream_P).sum(), leaves)
    found = trained_head_nll(hidden_PD, weight_VD, bias_V, targets_P)
    gradients = torch.autograd.grad((found.nll_P * upstream_P).sum(), leaves)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.nll_P, expected.nll_P, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.is_correct_P, expected.is_correct_P)
    for have, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


def test_bfloat16_weights_get_gradients_that_were_added_up_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_modelling, "CHUNK_BYTES", 8 * 4 * V)
    generator = torch.Generator().manual_seed(0)
    hidden_PD = torch.randn(P, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator).bfloat16().requires_grad_(True)
    targets_P = torch.randint(V, (P,), generator=generator)
    wide_VD = weight_VD.detach().float().requires_grad_(True)
    trained_head_nll(hidden_PD.bfloat16(), weight_VD, None, targets_P).nll_P.sum().backward()
    next_token_nll_reference(hidden_PD.bfloat16().float() @ wide_VD.t(), targets_P).nll_P.sum().backward()
    assert weight_VD.grad is not None
    assert wide_VD.grad is not None
    assert weight_VD.grad.dtype == torch.bfloat16
    assert float((weight_VD.grad.float() - wide_VD.grad).norm() / wide_VD.grad.norm()) < 0.01
