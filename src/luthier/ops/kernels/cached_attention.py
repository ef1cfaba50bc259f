"""Attention of single tokens over the keys and values that their sequences have stored.

Shapes: P tokens, H query heads, K key heads (K divides H), G = H / K, R rows of the cache, L positions, D head size,
S splits.

One program serves one token, one key head and one share of the stored positions; it reads no position that the token
does not see, so that a cache may hold sequences of any lengths side by side. The first share's program also stores the
token's own key and value. Where a few tokens would leave the GPU idle the positions are shared out, and a second kernel
joins the shares (as flash-decoding does, Dao et al. 2023, https://pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
MAX_SPLITS = 8


@triton.jit
def _attend(
    query, key, value, keys, values, rows, ends, out, parts, peaks, sums,
    query_stride, key_stride, value_stride, row_stride, head_stride, num_heads, window, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    split = tl.program_id(2)
    end = tl.load(ends + token)
    features = tl.arange(0, PADDED)
    is_feature = features < SIZE
    of_group = tl.arange(0, QUERIES)
    heads = key_head * GROUP + of_group
    is_query = (of_group < GROUP)[:, None] & is_feature[None, :]
    at_query = heads[:, None] * SIZE + features[None, :]
    q = tl.load(query + token * query_stride + at_query, mask=is_query, other=0.0)
    new_key = tl.load(key + token * key_stride + key_head * SIZE + features, mask=is_feature, other=0.0)
    new_value = tl.load(value + token * value_stride + key_head * SIZE + features, mask=is_feature, other=0.0)
    line = tl.load(rows + token) * row_stride + key_head * head_stride
    is_first = split == 0
    stores = features < tl.where(is_first, tl.minimum(end, 1) * SIZE, 0)  # filler stores nothing
    tl.store(keys + line + (end - 1) * SIZE + features, new_key, mask=stores)
    tl.store(values + line + (end - 1) * SIZE + features, new_value, mask=stores)

    own = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale
    peak = tl.where(is_first, own, float("-inf"))
    total = tl.where(is_first, tl.full([QUERIES], 1.0, tl.float32), 0.0)
    sum_ = tl.where(is_first, 1.0, 0.0) * (tl.zeros([QUERIES, PADDED], tl.float32) + new_value.to(tl.float32)[None, :])

    begin = tl.maximum(end - window, 0)
    span = (tl.maximum(end - 1 - begin, 0) + SPLITS - 1) // SPLITS
    low = begin + split * span
    high = tl.minimum(low + span, end - 1)
    for start in range(low, high, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        is_seen = positions < high
        at = positions.to(tl.int64)[:, None] * SIZE + features[None, :]
        inside = is_seen[:, None] & is_feature[None, :]
        k = tl.load(keys + line + at, mask=inside, other=0.0)
        v = tl.load(values + line + at, mask=inside, other=0.0)
        if QUERIES == 1:
            one = tl.sum(q, axis=0).to(tl.float32)
            score = tl.sum(k.to(tl.float32) * one[None, :], axis=1)[None, :]
        else:
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = tl.where(is_seen[None, :], score * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        decay = tl.exp2(peak - higher)
        total = total * decay + tl.sum(weight, axis=1)
        if QUERIES == 1:
            of_one = tl.sum(weight, axis=0)
            sum_ = sum_ * decay[:, None] + tl.sum(of_one[:, None] * v.to(tl.float32), axis=0)[None, :]
        else:
            sum_ = sum_ * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        peak = higher

    if SPLITS == 1:
        result = tl.where(end > 0, sum_ / total[:, None], 0.0)
        tl.store(out + token * num_heads * SIZE + at_query, result.to(out.dtype.element_ty), mask=is_query)
    else:
        index = (token * num_heads + heads) * SPLITS + split
        tl.store(parts + index[:, None] * SIZE + features[None, :], sum_, mask=is_query)
        tl.store(peaks + index, peak, mask=of_group < GROUP)
        tl.store(sums + index, total, mask=of_group < GROUP)


@triton.jit
def _join(parts, peaks, sums, ends, out, num_heads, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    features = tl.arange(0, PADDED)
    splits = tl.arange(0, SPLITS)
    first = (token * num_heads + head) * SPLITS
    peak = tl.load(peaks + first + splits)
    weight = tl.exp2(peak - tl.max(peak, axis=0))
    total = tl.sum(weight * tl.load(sums + first + splits), axis=0)
    at = (first + splits)[:, None] * SIZE + features[None, :]
    part = tl.load(parts + at, mask=features[None, :] < SIZE, other=0.0)
    result = tl.where(tl.load(ends + token) > 0, tl.sum(weight[:, None] * part, axis=0) / total, 0.0)
    at_out = (token * num_heads + head) * SIZE + features
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=features < SIZE)


def attend(
    query_PHD: Tensor, key_PKD: Tensor, value_PKD: Tensor, keys_RKLD: Tensor, values_RKLD: Tensor, rows_P: Tensor,
    ends_P: Tensor, scale: float, window: int | None, num_processors: int,
) -> Tensor:  # fmt: skip
    """As `ops.cached_attention.attend_cached`."""
    (num_tokens, num_heads, size), num_key_heads = query_PHD.shape, key_PKD.shape[1]
    for heads in (query_PHD, key_PKD, value_PKD):
        if heads.stride()[1:] != (size, 1):
            raise ValueError(f"the heads of a token must stand next to one another, not at strides {heads.stride()}")
    if keys_RKLD.stride() != values_RKLD.stride() or keys_RKLD.stride()[2:] != (size, 1):
        raise ValueError("the positions of a head must stand next to one another, alike for keys and values")
    group = num_heads // num_key_heads
    wanted = 2 * num_processors // (num_tokens * num_key_heads)
    splits = 1 << (max(1, min(MAX_SPLITS, wanted)).bit_length() - 1)
    out_PHD = torch.empty(num_tokens, num_heads, size, dtype=query_PHD.dtype, device=query_PHD.device)
    parts = peaks = sums = out_PHD
    if splits > 1:
        parts = torch.empty(num_tokens * num_heads * splits, size, dtype=torch.float32, device=query_PHD.device)
        peaks, sums = torch.empty(2, num_tokens * num_heads * splits, dtype=torch.float32, device=query_PHD.device)
    padded = triton.next_power_of_2(size)
    _attend[(num_tokens, num_key_heads, splits)](
        query_PHD, key_PKD, value_PKD, keys_RKLD, values_RKLD, rows_P, ends_P, out_PHD, parts, peaks, sums,
        query_PHD.stride(0), key_PKD.stride(0), value_PKD.stride(0), keys_RKLD.stride(0), keys_RKLD.stride(1),
        num_heads, window if window is not None else keys_RKLD.shape[2], scale * math.log2(math.e),
        SIZE=size, PADDED=padded, GROUP=group, QUERIES=1 if group == 1 else max(16, triton.next_power_of_2(group)),
        BLOCK=BLOCK, SPLITS=splits, PRECISION="ieee" if query_PHD.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _join[(num_tokens, num_heads)](
            parts, peaks, sums, ends_P, out_PHD, num_heads, SIZE=size, PADDED=padded, SPLITS=splits, num_warps=1
        )
    return out_PHD
