"""Packed attention against an explicit mask over the whole flat batch.

Shapes: H query heads, K key heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.base.attention import packed_attention

LENGTHS = (5, 1, 12, 7)


def inputs(num_heads: int = 4, num_key_heads: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return [
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (num_heads, num_key_heads, num_key_heads)
    ]


def offsets(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)


def run(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    given = {"cu_seq_lens_q": offsets(), "max_length_q": max(LENGTHS)} | named
    out, weights = packed_attention(nn.Module(), query, key, value, None, **given)
    assert weights is None
    return out


def explicit(
    query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None, causal: bool = True, scale: float = 8**-0.5
) -> Tensor:
    """[1, T, H, D], by softmax over scores with everything else masked out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    row_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    at_T = torch.arange(query.shape[2])
    behind_TT = at_T[:, None] - at_T[None, :]
    seen_TT = row_T[:, None] == row_T[None, :]
    if causal:
        seen_TT &= behind_TT >= 0
    if window is not None:
        seen_TT &= behind_TT.abs() < window
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen_TT, float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 12, 100])
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
def test_equals_an_explicit_mask(num_key_heads: int, window: int | None, causal: bool) -> None:
    given, twins = inputs(4, num_key_heads), inputs(4, num_key_heads)
    found = run(*given, sliding_window=window, is_causal=causal)
    expected = explicit(*twins, window=window, causal=causal)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), given),
        torch.autograd.grad((expected * weights).sum(), twins),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_scaling_is_the_models_own() -> None:
    torch.testing.assert_close(run(*inputs(), scaling=0.3), explicit(*inputs(), scale=0.3))


def test_the_module_says_whether_it_is_causal() -> None:
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    out, _ = packed_attention(module, *inputs(), None, cu_seq_lens_q=offsets(), max_length_q=max(LENGTHS))
    torch.testing.assert_close(out, explicit(*inputs(), causal=False))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"dropout": 0.1}, "dropout"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"cu_seq_lens_q": None}, "cu_seq_lens_q"),
    ],
)
def test_what_would_change_the_scores_is_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*inputs(), **named)


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        packed_attention(nn.Module(), *inputs(), torch.ones(1), cu_seq_lens_q=offsets(), max_length_q=max(LENGTHS))


def test_arguments_without_a_value_and_inert_ones_pass() -> None:
    found = run(*inputs(), softcap=None, s_aux=None, dropout=0.0, use_cache=False, position_ids=torch.zeros(1))
    torch.testing.assert_close(found, explicit(*inputs()))
