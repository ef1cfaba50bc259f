"""Attention of tokens that come alone, each over what its sequence has stored.

Shapes: P tokens, H query heads, K key heads (K divides H), R rows of the cache, L positions, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.capability import num_processors, runs_kernels


class StoredLayer(Protocol):
    """One layer of what sequences have stored, for a forward whose tokens go on from there."""

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float, window: int | None) -> Tensor:
        """Store the tokens' keys and values, and attend over all that their sequences have stored; [T, H, D]."""


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """A `StoredLayer` for tokens that come alone, each to a row of its own.

    Attributes:
        keys_RKLD, values_RKLD: What is stored.
        rows_P: int64, the row of each token; all different where `ends_P` is not 0.
        ends_P: int64, positions of each token's sequence with the token itself; 0 for a token that is filler.
    """

    keys_RKLD: Tensor
    values_RKLD: Tensor
    rows_P: Tensor
    ends_P: Tensor

    def attend(self, query_PHD: Tensor, key_PKD: Tensor, value_PKD: Tensor, scale: float, window: int | None) -> Tensor:
        return attend_cached(query_PHD, key_PKD, value_PKD, self, scale, window)


def attend_cached(
    query_PHD: Tensor, key_PKD: Tensor, value_PKD: Tensor, cached: CachedLayer, scale: float, window: int | None
) -> Tensor:
    """Store each token's key and value as the last of its row, and attend over the row.

    Args:
        window: A token sees itself and at most `window - 1` tokens before it; None for no bound.

    Returns:
        [P, H, D], contiguous; zeros for filler.
    """
    if runs_kernels(query_PHD):
        from luthier.ops.kernels import cached_attention as kernels

        return kernels.attend(
            query_PHD, key_PKD, value_PKD, cached.keys_RKLD, cached.values_RKLD, cached.rows_P, cached.ends_P,
            scale, window, num_processors(query_PHD.device),
        )  # fmt: skip
    return attend_cached_reference(query_PHD, key_PKD, value_PKD, cached, scale, window)


def attend_cached_reference(
    query_PHD: Tensor, key_PKD: Tensor, value_PKD: Tensor, cached: CachedLayer, scale: float, window: int | None
) -> Tensor:
    """The same, token by token."""
    out_PHD = torch.zeros_like(query_PHD)
    rows, ends = cached.rows_P.tolist(), cached.ends_P.tolist()
    for token, (row, end) in enumerate(zip(rows, ends, strict=True)):
        if not end:
            continue
        cached.keys_RKLD[row, :, end - 1] = key_PKD[token]
        cached.values_RKLD[row, :, end - 1] = value_PKD[token]
        first = max(0, end - window) if window is not None else 0
        key_KnD, value_KnD = cached.keys_RKLD[row, :, first:end], cached.values_RKLD[row, :, first:end]
        out_1H1D = F.scaled_dot_product_attention(
            query_PHD[token][None, :, None],
            key_KnD[None],
            value_KnD[None],
            scale=scale,
            enable_gqa=query_PHD.shape[1] != key_PKD.shape[1],
        )
        out_PHD[token] = out_1H1D[0, :, 0]
    return out_PHD
