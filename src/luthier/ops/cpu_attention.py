"""Causal attention over packed sequences on a CPU, as a forward and a backward.

Shapes: T tokens of all sequences, H query heads, K key heads, G = H / K, D head size, N sequences of a group, L its
longest sequence.

    o = softmax(c q k^T + mask) v,    c = scale

Sequences of up to `MAX_SHORT_TOKENS` run in groups of like length, as batched products: each takes microseconds, and a
call of the fused kernel for each of them costs two to three times as much. The heads that share a key head are rows of
one product. A group is padded at its end, where a causal mask hides the padding from every real token; the padding's
own probabilities are set to zero, so that it gives no gradient. Longer sequences run through torch's fused kernel one
by one, whose memory does not grow with the square of their length.

A sequence may begin with rows that belong to another one (`engine/live_rows.py`). Its queries stand there too, as
padding does, and the gradients of those rows' keys and values add up.

The reference is `base/attention.py`'s scaled_dot_product_attention per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_SHORT_TOKENS = 64
"""Past about 100 the fused kernel is as fast."""

MAX_PADDING = 1.25
"""A group's longest sequence has at most this many times the tokens of its shortest."""


@dataclass(frozen=True, slots=True)
class Member:
    """One sequence.

    Attributes:
        rows_L: int64 [L], ascending or not. The flat rows of its tokens.
        num_shared: How many of them, at its start, belong to another sequence.
    """

    rows_L: np.ndarray
    num_shared: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that run together.

    Attributes:
        num_sequences, longest: N and L.
        query_at, key_at: int64 [N x H x L], [N x K x L]. For each row of the padded layouts [N, K, G, L] and [N, K, L]
            the row of the flat tensors [T x H] and [T x K]; padding repeats a sequence's last token.
        query_from, key_from: int64. The rows of the padded layouts that are the sequences' own, no padding.
        query_to, key_to: int64. Where those stand in the flat tensors.
        shared_from, shared_to: int64. As `key_from` and `key_to`, of rows that belong to another sequence.
        is_own_N11L1: float32, 1 for a sequence's own rows; None where there are no others.
    """

    num_sequences: int
    longest: int
    query_at: Tensor
    key_at: Tensor
    query_from: Tensor
    key_from: Tensor
    query_to: Tensor
    key_to: Tensor
    shared_from: Tensor
    shared_to: Tensor
    is_own_N11L1: Tensor | None


@dataclass(frozen=True, slots=True)
class Long:
    """A sequence that runs by itself: its flat rows, and how many at its start belong to another sequence."""

    rows_L: Tensor
    num_shared: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a batch is cut: groups of short sequences, and the long ones."""

    groups: tuple[Group, ...]
    longs: tuple[Long, ...]


def serves(query: Tensor, lengths: tuple[int, ...], window: int | None) -> bool:
    """Whether these functions compute this batch: a window may cut short sequences alone."""
    if query.is_cuda or query.dtype not in (torch.float32, torch.float64):
        return False
    return window is None or not any(length > max(window, MAX_SHORT_TOKENS) for length in lengths)


def attend_on_cpu(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, layout: Layout, scale: float, window: int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output [T, H, D], contiguous, and what the backward needs besides inputs and output."""
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype)
    for group in layout.groups:
        q, k, v = _gathered(group, query_THD, key_TKD, value_TKD)
        rows = torch.bmm(_probability(group, q, k, scale, window), v).view(-1, v.shape[-1])
        _put(out_THD, group.query_to, rows, group.query_from)
    saved: list[Tensor] = []
    for long in layout.longs:
        q, k, v = _long(query_THD, key_TKD, value_TKD, long)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        out_THD.index_copy_(0, *_own(long, out[0].transpose(0, 1)))
        saved.append(logsumexp)
    return out_THD, tuple(saved)


def attend_on_cpu_backward(
    grad_THD: Tensor, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, out_THD: Tensor,
    saved: tuple[Tensor, ...], layout: Layout, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, each [T, heads, D] and contiguous."""
    num_keys = key_TKD.shape[1]
    dq_THD, dk_TKD, dv_TKD = (torch.empty(part.shape, dtype=part.dtype) for part in (query_THD, key_TKD, value_TKD))
    shared: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in layout.groups:
        q, k, v = _gathered(group, query_THD, key_TKD, value_TKD)
        probability = _probability(group, q, k, scale, window)
        g = _rows(grad_THD).index_select(0, group.query_at).view(q.shape)
        dv = torch.bmm(probability.transpose(1, 2), g)
        slope = torch.bmm(g, v.transpose(1, 2))
        slope = torch.ops.aten._softmax_backward_data(slope, probability, -1, slope.dtype).mul_(scale)
        _put(dq_THD, group.query_to, torch.bmm(slope, k).view(-1, k.shape[-1]), group.query_from)
        for into, part in ((dk_TKD, torch.bmm(slope.transpose(1, 2), q)), (dv_TKD, dv)):
            rows = part.view(-1, part.shape[-1])
            _put(into, group.key_to, rows, group.key_from)
            if len(group.shared_to):
                shared.append((_rows(into), group.shared_to, rows.index_select(0, group.shared_from)))
    for long, logsumexp in zip(layout.longs, saved, strict=True):
        q, k, v = _long(query_THD, key_TKD, value_TKD, long)
        g, out = (part.index_select(0, long.rows_L).transpose(0, 1)[None] for part in (grad_THD, out_THD))
        g[:, :, : long.num_shared] = 0
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out, logsumexp, 0.0, True, scale=scale
        )
        dq_THD.index_copy_(0, *_own(long, dq[0].transpose(0, 1)))
        for into, part in ((dk_TKD, dk), (dv_TKD, dv)):
            rows = part[0].unflatten(0, (num_keys, -1)).sum(dim=1).transpose(0, 1)
            into.index_copy_(0, *_own(long, rows))
            if long.num_shared:
                shared.append((into, long.rows_L[: long.num_shared], rows[: long.num_shared].contiguous()))
    for into, to, rows in shared:  # last, for by now their owners have written to them
        into.index_add_(0, to, rows)
    return dq_THD, dk_TKD, dv_TKD


class CpuAttention(torch.autograd.Function):
    """The two as a node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        layout: Layout,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out_THD, saved = attend_on_cpu(query_THD, key_TKD, value_TKD, layout, scale, window)
        ctx.save_for_backward(query_THD, key_TKD, value_TKD, out_THD, *saved)
        ctx.cut = layout, scale, window
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_TKD, value_TKD, out_THD, *saved = ctx.saved_tensors
        parts = attend_on_cpu_backward(grads[0], query_THD, key_TKD, value_TKD, out_THD, tuple(saved), *ctx.cut)
        return (*parts, None, None, None)


@lru_cache(maxsize=64)
def layout_of(lengths: tuple[int, ...], num_heads: int, num_keys: int) -> Layout:
    """Of sequences that stand one after another. The same for every layer of a forward, and so made once."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return make_layout([Member(np.arange(*pair)) for pair in pairwise(bounds)], num_heads, num_keys)


def make_layout(members: Sequence[Member], num_heads: int, num_keys: int) -> Layout:
    """The layout of sequences whose rows lie anywhere."""
    ordered = sorted(members, key=lambda member: len(member.rows_L))
    groups: list[list[Member]] = []
    for member in ordered:
        length = len(member.rows_L)
        if length > MAX_SHORT_TOKENS:
            break
        if not groups or length > len(groups[-1][0].rows_L) * MAX_PADDING:
            groups.append([])
        groups[-1].append(member)
    longs = [
        Long(torch.from_numpy(member.rows_L), member.num_shared)
        for member in ordered
        if len(member.rows_L) > MAX_SHORT_TOKENS
    ]
    return Layout(tuple(_group(group, num_heads, num_keys) for group in groups), tuple(longs))


def _group(members: Sequence[Member], num_heads: int, num_keys: int) -> Group:
    lengths_N = torch.tensor([len(member.rows_L) for member in members])
    shared_N = torch.tensor([member.num_shared for member in members])
    longest = int(lengths_N.max())
    within_L = torch.arange(longest)
    is_real_NL = within_L < lengths_N[:, None]
    is_own_NL = is_real_NL & (within_L >= shared_N[:, None])
    padded = [np.pad(member.rows_L, (0, longest - len(member.rows_L)), mode="edge") for member in members]
    tokens_NL = torch.from_numpy(np.stack(padded))

    def rows(num: int, chosen_NL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_NhL = tokens_NL[:, None, :] * num + torch.arange(num)[:, None]
        at = at_NhL.reshape(-1)
        chosen = torch.nonzero(chosen_NL[:, None, :].expand_as(at_NhL).reshape(-1))[:, 0]
        return at, chosen, at[chosen]

    query_at, query_from, query_to = rows(num_heads, is_own_NL)
    key_at, key_from, key_to = rows(num_keys, is_own_NL)
    _, shared_from, shared_to = rows(num_keys, is_real_NL & ~is_own_NL)
    is_own = None if bool(is_own_NL.all()) else is_own_NL[:, None, None, :, None].to(torch.float32)
    return Group(
        len(members), longest, query_at, key_at, query_from, key_from, query_to, key_to, shared_from, shared_to, is_own
    )


def _probability(group: Group, q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """[N x K, G x L, L]; made again in the backward, for it grows with the square of the length and costs little."""
    score = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    shape = (group.num_sequences, -1, q.shape[1] // group.longest, group.longest, group.longest)
    score.view(shape).add_(_mask(group.longest, window, q.dtype))
    probability = torch.softmax(score, dim=-1)
    if group.is_own_N11L1 is not None:
        probability.view(shape).mul_(group.is_own_N11L1)
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


def _long(query: Tensor, key: Tensor, value: Tensor, long: Long) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence as [1, H, L, D]; keys and values repeated for the heads that share them."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (part.index_select(0, long.rows_L).transpose(0, 1)[None] for part in (query, key, value))
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return q, k, v


def _own(long: Long, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sequence's own rows stand, and they."""
    return long.rows_L[long.num_shared :], rows[long.num_shared :]
