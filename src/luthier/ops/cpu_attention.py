"""Causal attention over packed sequences on a CPU, as a forward and a backward.

Shapes: T tokens of all sequences, H query heads, K key heads, G = H / K, D head size, N sequences of a group, L its
longest sequence.

    o = softmax(c q k^T + mask) v,    c = scale

Sequences of up to `MAX_SHORT_TOKENS` run in groups of like length, as batched products: each takes microseconds, and a
call of the fused kernel for each of them costs two to three times as much. The heads that share a key head are rows of
one product. A group is padded at its end, where a causal mask hides the padding from every real token; the padding's
own probabilities are set to zero, so that it gives no gradient. Longer sequences run through torch's fused kernel one
by one, whose memory does not grow with the square of their length.

The reference is `base/attention.py`'s scaled_dot_product_attention per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_SHORT_TOKENS = 64
"""Past about 100 the fused kernel is as fast."""

MAX_PADDING = 1.25
"""A group's longest sequence has at most this many times the tokens of its shortest."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that run together.

    Attributes:
        num_sequences, longest: N and L.
        query_at, key_at: int64 [N x H x L], [N x K x L]. For each row of the padded layouts [N, K, G, L] and [N, K, L]
            the row of the flat tensors [T x H] and [T x K]; padding repeats a sequence's last token.
        query_from, key_from: int64. The rows of the padded layouts that are no padding.
        query_to, key_to: int64. Where those stand in the flat tensors.
        is_real_N11L1: float32, 0 for padding; None where there is none.
    """

    num_sequences: int
    longest: int
    query_at: Tensor
    key_at: Tensor
    query_from: Tensor
    key_from: Tensor
    query_to: Tensor
    key_to: Tensor
    is_real_N11L1: Tensor | None


@dataclass(frozen=True, slots=True)
class Layout:
    """How a batch is cut: groups of short sequences, and the bounds of the long ones."""

    groups: tuple[Group, ...]
    long_bounds: tuple[tuple[int, int], ...]


def serves(query: Tensor, lengths: tuple[int, ...], window: int | None) -> bool:
    """Whether these functions compute this batch: a window may cut short sequences alone."""
    if query.is_cuda or query.dtype not in (torch.float32, torch.float64):
        return False
    return window is None or not any(length > max(window, MAX_SHORT_TOKENS) for length in lengths)


def attend_on_cpu(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output [T, H, D], contiguous, and what the backward needs besides inputs and output."""
    num_heads, num_keys = query_THD.shape[1], key_TKD.shape[1]
    layout = layout_of(lengths, num_heads, num_keys)
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype)
    for group in layout.groups:
        q, k, v = _gathered(group, query_THD, key_TKD, value_TKD)
        rows = torch.bmm(_probability(group, q, k, scale, window), v).view(-1, v.shape[-1])
        _put(out_THD, group.query_to, rows, group.query_from)
    saved: list[Tensor] = []
    for start, end in layout.long_bounds:
        q, k, v = _long(query_THD, key_TKD, value_TKD, start, end)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        out_THD[start:end] = out[0].transpose(0, 1)
        saved.append(logsumexp)
    return out_THD, tuple(saved)


def attend_on_cpu_backward(
    grad_THD: Tensor, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, out_THD: Tensor,
    saved: tuple[Tensor, ...], lengths: tuple[int, ...], scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, each [T, heads, D] and contiguous."""
    num_heads, num_keys = query_THD.shape[1], key_TKD.shape[1]
    layout = layout_of(lengths, num_heads, num_keys)
    dq_THD, dk_TKD, dv_TKD = (torch.empty(part.shape, dtype=part.dtype) for part in (query_THD, key_TKD, value_TKD))
    for group in layout.groups:
        q, k, v = _gathered(group, query_THD, key_TKD, value_TKD)
        probability = _probability(group, q, k, scale, window)
        g = _rows(grad_THD).index_select(0, group.query_at).view(q.shape)
        dv = torch.bmm(probability.transpose(1, 2), g)
        slope = torch.bmm(g, v.transpose(1, 2))
        slope = torch.ops.aten._softmax_backward_data(slope, probability, -1, slope.dtype).mul_(scale)
        _put(dq_THD, group.query_to, torch.bmm(slope, k).view(-1, k.shape[-1]), group.query_from)
        _put(dk_TKD, group.key_to, torch.bmm(slope.transpose(1, 2), q).view(-1, k.shape[-1]), group.key_from)
        _put(dv_TKD, group.key_to, dv.view(-1, v.shape[-1]), group.key_from)
    for (start, end), logsumexp in zip(layout.long_bounds, saved, strict=True):
        q, k, v = _long(query_THD, key_TKD, value_TKD, start, end)
        g, out = (part[start:end].transpose(0, 1)[None] for part in (grad_THD, out_THD))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out, logsumexp, 0.0, True, scale=scale
        )
        dq_THD[start:end] = dq[0].transpose(0, 1)
        for into, part in ((dk_TKD, dk), (dv_TKD, dv)):
            into[start:end] = part[0].unflatten(0, (num_keys, -1)).sum(dim=1).transpose(0, 1)
    return dq_THD, dk_TKD, dv_TKD


class CpuAttention(torch.autograd.Function):
    """The two as a node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        out_THD, saved = attend_on_cpu(query_THD, key_TKD, value_TKD, lengths, scale, window)
        ctx.save_for_backward(query_THD, key_TKD, value_TKD, out_THD, *saved)
        ctx.cut = lengths, scale, window
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_TKD, value_TKD, out_THD, *saved = ctx.saved_tensors
        parts = attend_on_cpu_backward(grads[0], query_THD, key_TKD, value_TKD, out_THD, tuple(saved), *ctx.cut)
        return (*parts, None, None, None)


@lru_cache(maxsize=64)
def layout_of(lengths: tuple[int, ...], num_heads: int, num_keys: int) -> Layout:
    """The same for every layer of a forward, and so made once."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    members = sorted(zip(lengths, starts, strict=False))
    groups: list[list[tuple[int, int]]] = []
    for length, start in members:
        if length > MAX_SHORT_TOKENS:
            break
        if not groups or length > groups[-1][0][0] * MAX_PADDING:
            groups.append([])
        groups[-1].append((length, start))
    bounds = [(start, start + length) for length, start in members if length > MAX_SHORT_TOKENS]
    return Layout(tuple(_group(group, num_heads, num_keys) for group in groups), tuple(bounds))


def _group(members: list[tuple[int, int]], num_heads: int, num_keys: int) -> Group:
    lengths_N = torch.tensor([length for length, _ in members])
    starts_N = torch.tensor([start for _, start in members])
    longest = int(lengths_N.max())
    within_L = torch.arange(longest)
    is_real_NL = within_L < lengths_N[:, None]
    tokens_NL = starts_N[:, None] + torch.minimum(within_L, lengths_N[:, None] - 1)

    def rows(num: int) -> tuple[Tensor, Tensor, Tensor]:
        at_NhL = tokens_NL[:, None, :] * num + torch.arange(num)[:, None]
        real_NhL = is_real_NL[:, None, :].expand_as(at_NhL)
        at = at_NhL.reshape(-1)
        chosen = torch.nonzero(real_NhL.reshape(-1))[:, 0]
        return at, chosen, at[chosen]

    query_at, query_from, query_to = rows(num_heads)
    key_at, key_from, key_to = rows(num_keys)
    is_real = None if bool(is_real_NL.all()) else is_real_NL[:, None, None, :, None].to(torch.float32)
    return Group(len(members), longest, query_at, key_at, query_from, key_from, query_to, key_to, is_real)


def _probability(group: Group, q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """[N x K, G x L, L]; made again in the backward, for it grows with the square of the length and costs little."""
    score = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    shape = (group.num_sequences, -1, q.shape[1] // group.longest, group.longest, group.longest)
    score.view(shape).add_(_mask(group.longest, window, q.dtype))
    probability = torch.softmax(score, dim=-1)
    if group.is_real_N11L1 is not None:
        probability.view(shape).mul_(group.is_real_N11L1)
    return probability


@lru_cache(maxsize=2 * MAX_SHORT_TOKENS)
def _mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where the row's token sees the column's, else minus infinity."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window if window is not None else length))
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _rows(part: Tensor) -> Tensor:
    """[T, heads, D] -> [T x heads, D]."""
    return part.reshape(-1, part.shape[-1])


def _gathered(group: Group, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N x K, G x L, D] of the queries, and [N x K, L, D] of keys and values."""
    size, num = query.shape[-1], group.num_sequences * key.shape[1]
    q = _rows(query).index_select(0, group.query_at).view(num, -1, size)
    k, v = (_rows(part).index_select(0, group.key_at).view(num, -1, part.shape[-1]) for part in (key, value))
    return q, k, v


def _put(into: Tensor, to: Tensor, rows: Tensor, at: Tensor) -> None:
    into.view(-1, into.shape[-1]).index_copy_(0, to, rows if len(at) == len(rows) else rows.index_select(0, at))


def _long(query: Tensor, key: Tensor, value: Tensor, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence as [1, H, L, D]; keys and values repeated for the heads that share them."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return q, k, v
