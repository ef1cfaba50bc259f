"""Attention over packed sequences on a CPU, held against torch's own one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.base.attention import window_mask
from luthier.ops.cpu_attention import CpuAttention, Member, layout_of, make_layout, serves

CASES = [
    ((5,), 4, 2, None),
    ((1, 1, 1), 4, 4, None),
    ((26, 30, 12, 60, 64, 65, 300, 7), 9, 3, None),
    ((64, 63, 50), 6, 2, 9),
    ((3, 40, 8), 4, 1, 100),
    ((200,), 2, 1, None),
]


@pytest.mark.parametrize(("lengths", "num_heads", "num_keys", "window"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_output_and_gradients_equal_those_of_each_sequence_alone(
    lengths: tuple[int, ...],
    num_heads: int,
    num_keys: int,
    window: int | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    query, key, value = inputs(lengths, num_heads, num_keys, dtype)
    assert serves(query, lengths, window)
    found = CpuAttention.apply(query, key, value, layout_of(lengths, num_heads, num_keys), 0.3, window)
    grad = torch.randn(found.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found_grads = torch.autograd.grad(found, (query, key, value), grad)
    expected = alone(query, key, value, lengths, 0.3, window)
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad)
    for one, other in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_neighbour_does_not_change_a_short_sequence() -> None:
    query, key, value = inputs((20, 25, 3), 4, 2, torch.float64)
    together = CpuAttention.apply(query, key, value, layout_of((20, 25, 3), 4, 2), 0.5, None)
    by_itself = CpuAttention.apply(query[:20], key[:20], value[:20], layout_of((20,), 4, 2), 0.5, None)
    torch.testing.assert_close(together[:20], by_itself, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("length", "window"), [(30, None), (90, None), (30, 9)])
def test_rows_that_sequences_share_equal_copies_of_them(length: int, window: int | None) -> None:
    """Three sequences begin with the first one's rows; the last of them with the second one's too."""
    query, key, value = inputs((length, length, length), 4, 2, torch.float64)
    flat = np.arange(3 * length)
    second = np.concatenate([flat[:7], flat[length : 2 * length - 7]])
    third = np.concatenate([second[:12], flat[2 * length - 7 : 3 * length - 19]])
    members = [Member(flat[:length]), Member(second, 7), Member(third, 12)]
    used = 3 * length - 19
    grad = torch.randn(used, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = CpuAttention.apply(*(part[:used] for part in (query, key, value)), make_layout(members, 4, 2), 0.3, window)
    found_grads = torch.autograd.grad(found, (query, key, value), grad)
    own = torch.zeros(used, 4, 16, dtype=torch.float64)
    for member in members:
        rows = torch.from_numpy(member.rows_L)
        out = alone(query[rows], key[rows], value[rows], (length,), 0.3, window)
        own = own.index_copy(0, rows[member.num_shared :], out[member.num_shared :])
    expected_grads = torch.autograd.grad(own, (query, key, value), grad)
    for one, other in zip((found, *found_grads), (own, *expected_grads), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_windows_that_cut_a_long_sequence_are_left_to_the_reference() -> None:
    query, _, _ = inputs((200,), 2, 1, torch.float32)
    assert not serves(query, (200,), 100)
    assert serves(query, (200,), 200)
    assert not serves(query.to(torch.bfloat16), (200,), None)


def inputs(
    lengths: tuple[int, ...], num_heads: int, num_keys: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 16) for heads in (num_heads, num_keys, num_keys)]
    query, key, value = (torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes)
    return query, key, value


def alone(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    outputs = []
    for q, k, v in zip(*(part.split(lengths) for part in (query, key, value)), strict=True):
        mask = window_mask(len(q), window or len(q), True, q.device)
        heads = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
