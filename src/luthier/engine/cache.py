"""Keys and values of the sequences that are being sampled, a row each.

Shapes: R rows of the cache in use, N sequences of a forward, n those of them that bring one token, T new tokens of all
sequences, H query heads, K key heads (K divides H), L positions, D head size.

A forward brings new tokens of several sequences, flat. `begin` says which row each belongs to and at which position it
goes on; attention then calls `attend` once a layer. Sequences with one new token, the usual case, attend together:
their queries are put into the order of the rows, which is cheap, while the keys stay where they are. Sequences with
several new tokens (a prompt, or a part of one) attend one by one; on a GPU whole prompts attend together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.base.attention import window_mask
from luthier.engine.pack import PackedBatch
from luthier.ops import flat_attention
from luthier.ops.flat_attention import Sequences

_POSITIONS_STEP = 64


@dataclass(frozen=True, slots=True)
class _Span:
    """Several new tokens of one sequence: flat bounds, their row, and the position of the first."""

    row: int
    start: int
    first: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.first

    @property
    def total(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class _Fresh:
    """Sequences from their beginning on: how they are cut, and flat index, row and position of each of their tokens."""

    sequences: Sequences
    at_T: Tensor
    rows_T: Tensor
    positions_T: Tensor


@dataclass(slots=True)
class _Step:
    """What one forward does, worked out once for all its layers.

    Attributes:
        totals: Length of each sequence as LongRoPE counts it.
        spans: Sequences with several new tokens, but for those of `fresh`.
        fresh: Sequences of several tokens from their beginning on, where one kernel takes them all.
        at_n, rows_n, positions_n: Flat index, row and position of every token that comes alone.
        query_at: For each row, the flat index of its query; any for a row that has none.
        visible: How many positions each row's query may see before a window; 1 for a row that has no query.
        is_in_order: Whether the flat batch is one token of each row, in the rows' order.
        masks: Additive masks by window (single tokens), and by span and window.
    """

    totals: list[int]
    spans: list[_Span]
    at_n: Tensor
    rows_n: Tensor
    positions_n: Tensor
    query_at: Tensor
    visible: list[int]
    is_in_order: bool
    fresh: _Fresh | None = None
    masks: dict[object, Tensor | None] = field(default_factory=dict)


class RowCache:
    """A `KeyValueCache` of rows, on the device and in the dtype of the first keys it is given.

    Memory is taken as it is needed and given back by `clear`. Rows stay readable until something else is written there.
    """

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._num_rows = 0
        self._num_positions = 0
        self._generation = 0
        self._step: _Step | None = None

    @property
    def num_bytes(self) -> int:
        stored = [*self._keys.values(), *self._values.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def clear(self) -> None:
        """Forget every row and give the memory back."""
        self._keys.clear()
        self._values.clear()
        self._num_rows = self._num_positions = 0
        self._generation += 1
        self._step = None

    def begin(
        self, batch: PackedBatch, rows: Sequence[int], starts: Sequence[int], totals: Sequence[int] | None = None
    ) -> None:
        """Announce a forward.

        Args:
            batch: Its new tokens, with their true positions.
            rows: The row of each sequence; all different.
            starts: How many positions of that row are stored already and belong to the sequence.
            totals: Length that decides each sequence's LongRoPE class, where it is more than what is stored after this
                forward (a prompt that comes in parts).
        """
        if len(set(rows)) != batch.num_sequences:
            raise ValueError("every sequence of a forward needs a row of its own")
        ends = [start + length for start, length in zip(starts, batch.lengths, strict=True)]
        self._reserve(max(rows) + 1, max(ends))
        # On a GPU a kernel a sequence would take longer to launch than to run.
        takes_fresh = batch.tokens_T.device.type == "cuda"
        spans, at, alone, fresh, first = [], [], [], [], 0
        for index, length in enumerate(batch.lengths):
            if length == 1:
                at.append(first)
                alone.append(index)
            elif takes_fresh and starts[index] == 0:
                fresh.append(_Span(rows[index], 0, first, first + length))
            else:
                spans.append(_Span(rows[index], starts[index], first, first + length))
            first += length
        num_rows = max((rows[index] for index in alone), default=-1) + 1
        query_at, visible = [0] * num_rows, [1] * num_rows
        for flat, index in zip(at, alone, strict=True):
            query_at[rows[index]], visible[rows[index]] = flat, ends[index]
        device = batch.tokens_T.device
        self._step = _Step(
            totals=list(totals if totals is not None else ends),
            spans=spans,
            at_n=torch.tensor(at, dtype=torch.int64, device=device),
            rows_n=torch.tensor([rows[index] for index in alone], dtype=torch.int64, device=device),
            positions_n=torch.tensor([starts[index] for index in alone], dtype=torch.int64, device=device),
            query_at=torch.tensor(query_at, dtype=torch.int64, device=device),
            visible=visible,
            is_in_order=len(visible) == first and query_at == list(range(first)),
            fresh=_fresh(fresh, device) if fresh else None,
        )

    def lengths_after(self, batch: PackedBatch) -> list[int]:
        """Length of each of the batch's sequences as LongRoPE counts it, everything stored before included."""
        step = self._announced()
        if len(step.totals) != batch.num_sequences:
            raise ValueError("another batch was announced")
        return step.totals

    def reserve(self, num_rows: int, num_positions: int) -> int:
        """See to room for so many rows and positions; a number that is another whenever the storage has become one."""
        self._reserve(num_rows, num_positions)
        return self._generation

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [R, K, L, D] of every layer: the storage itself, until it grows or is given back."""
        for stored in (self._keys, self._values):
            for layer, tensor_RKLD in stored.items():
                stored[layer] = self._fitted(tensor_RKLD)
        return [(self._keys[layer], self._values[layer]) for layer in sorted(self._keys)]

    def layer(self, index: int) -> RowLayer:
        """One layer of the announced forward, as a decoder block attends through it."""
        return RowLayer(self, index)

    def copy(self, source: int, target: int, num_positions: int) -> None:
        """Copy the first positions of one row into another, in every layer."""
        self._reserve(max(source, target) + 1, num_positions)
        for stored in (self._keys, self._values):
            for layer, tensor_RKLD in stored.items():
                stored[layer] = tensor_RKLD = self._fitted(tensor_RKLD)
                tensor_RKLD[target, :, :num_positions] = tensor_RKLD[source, :, :num_positions]

    def attend(
        self, layer: int, query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Store the new keys and values of `layer` and attend over everything the sequences have stored.

        Args:
            window: A token sees itself and at most `window - 1` tokens before it.

        Returns:
            The attention output [1, H, T, D].
        """
        step = self._announced()
        keys_RKLD = self._stored(self._keys, layer, key_1KTD)
        values_RKLD = self._stored(self._values, layer, value_1KTD)
        query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1KTD, value_1KTD))
        if step.is_in_order:
            keys_RKLD[step.rows_n, :, step.positions_n] = key_TKD
            values_RKLD[step.rows_n, :, step.positions_n] = value_TKD
            out_THD = self._attend_alone(query_THD, keys_RKLD, values_RKLD, scale, window)
            return out_THD.transpose(0, 1)[None]
        out_THD = query_THD.new_empty(*query_THD.shape[:2], value_1KTD.shape[-1])
        if step.at_n.numel():
            keys_RKLD[step.rows_n, :, step.positions_n] = key_TKD.index_select(0, step.at_n)
            values_RKLD[step.rows_n, :, step.positions_n] = value_TKD.index_select(0, step.at_n)
            query_RHD = query_THD.index_select(0, step.query_at)
            out_RHD = self._attend_alone(query_RHD, keys_RKLD, values_RKLD, scale, window)
            out_THD[step.at_n] = out_RHD.index_select(0, step.rows_n)
        if step.fresh is not None:
            fresh = step.fresh
            query, key, value = (x_THD.index_select(0, fresh.at_T) for x_THD in (query_THD, key_TKD, value_TKD))
            keys_RKLD[fresh.rows_T, :, fresh.positions_T] = key
            values_RKLD[fresh.rows_T, :, fresh.positions_T] = value
            out_THD[fresh.at_T] = flat_attention.attend(query, key, value, fresh.sequences, scale, window)[0]
        for span in step.spans:
            new = slice(span.first, span.end)
            keys_RKLD[span.row, :, span.start : span.total] = key_1KTD[0, :, new]
            values_RKLD[span.row, :, span.start : span.total] = value_1KTD[0, :, new]
            # A prompt from its beginning attends over what it brings; a later part over the whole row.
            key, value = key_1KTD[:, :, new], value_1KTD[:, :, new]
            if span.start > 0:
                key = keys_RKLD[span.row : span.row + 1, :, : span.total]
                value = values_RKLD[span.row : span.row + 1, :, : span.total]
            mask = self._span_mask(span, window, query_1HTD)
            out_1HnD = F.scaled_dot_product_attention(
                query_1HTD[:, :, new],
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query_1HTD.shape[1] != key_1KTD.shape[1],
            )
            out_THD[new] = out_1HnD[0].transpose(0, 1)
        return out_THD.transpose(0, 1)[None]

    # -- single tokens

    def _attend_alone(
        self, query_RHD: Tensor, keys_RKLD: Tensor, values_RKLD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        step = self._announced()
        num_rows, length = len(step.visible), max(step.visible)
        key, value = keys_RKLD[:num_rows, :, :length], values_RKLD[:num_rows, :, :length]
        num_heads, num_key_heads = query_RHD.shape[1], key.shape[1]
        # The query heads of one key head may stand as so many queries. CUDA's fused kernels want that, for with a mask
        # they know no grouped heads; the CPU's is faster with grouped heads.
        heads = (num_key_heads, num_heads // num_key_heads) if query_RHD.is_cuda else (num_heads, 1)
        out_RHGD = F.scaled_dot_product_attention(
            query_RHD.reshape(num_rows, *heads, -1),
            key,
            value,
            attn_mask=self._alone_mask(window, query_RHD),
            scale=scale,
            enable_gqa=heads[0] != num_key_heads,
        )
        return out_RHGD.reshape(num_rows, num_heads, -1)

    def _alone_mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Additive [R, 1, 1, L], or None where every row sees every position."""
        step = self._announced()
        if window not in step.masks:
            length = max(step.visible)
            if min(step.visible) == length and (window is None or length <= window):
                step.masks[window] = None
            else:
                at_L = torch.arange(length, device=like.device)
                ends_R1 = torch.tensor(step.visible, device=like.device)[:, None]
                seen_RL = at_L < ends_R1
                if window is not None:
                    seen_RL &= at_L >= ends_R1 - window
                step.masks[window] = _additive(seen_RL, like)[:, None, None]
        return step.masks[window]

    # -- several tokens of one sequence

    def _span_mask(self, span: _Span, window: int | None, like: Tensor) -> Tensor | None:
        """Additive [n, L] for n new tokens over L stored ones, or None for plain causal attention."""
        if span.start == 0 and (window is None or span.length <= window):
            return None
        masks, name = self._announced().masks, (span, window)
        if name not in masks:
            seen_LL = window_mask(span.total, window or span.total, causal=True, device=like.device)
            masks[name] = _additive(seen_LL[span.start :], like)
        return masks[name]

    # -- storage

    def _announced(self) -> _Step:
        if self._step is None:
            raise ValueError("a forward through the cache begins with begin()")
        return self._step

    def _reserve(self, num_rows: int, num_positions: int) -> None:
        """Note what the layers must hold; each grows when it is next touched. Growth is by half, to copy seldom."""
        if num_rows > self._num_rows:
            self._num_rows = max(num_rows, self._num_rows * 2)
            self._generation += 1
        if num_positions > self._num_positions:
            wanted = max(num_positions, self._num_positions * 3 // 2)
            self._num_positions = -(-wanted // _POSITIONS_STEP) * _POSITIONS_STEP
            self._generation += 1

    def _stored(self, store: dict[int, Tensor], layer: int, new_1KTD: Tensor) -> Tensor:
        if layer not in store:
            _, num_heads, _, size = new_1KTD.shape
            store[layer] = new_1KTD.new_zeros(self._num_rows, num_heads, self._num_positions, size)
        store[layer] = self._fitted(store[layer])
        return store[layer]

    def _fitted(self, tensor_RKLD: Tensor) -> Tensor:
        num_rows, num_heads, num_positions, size = tensor_RKLD.shape
        if num_rows >= self._num_rows and num_positions >= self._num_positions:
            return tensor_RKLD
        # Zeros, for a masked position that held a NaN would still spoil the sum.
        larger_RKLD = tensor_RKLD.new_zeros(self._num_rows, num_heads, self._num_positions, size)
        larger_RKLD[:num_rows, :, :num_positions] = tensor_RKLD
        return larger_RKLD


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


@dataclass(frozen=True, slots=True)
class RowLayer:
    """A layer of the forward that was announced to `cache`, over packed tokens."""

    cache: RowCache
    layer: int

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float, window: int | None) -> Tensor:
        """As `RowCache.attend`; returns [T, H, D]."""
        query, key, value = (part.transpose(0, 1)[None] for part in (query_THD, key_TKD, value_TKD))
        return self.cache.attend(self.layer, query, key, value, scale, window)[0].transpose(0, 1)


def _fresh(spans: Sequence[_Span], device: torch.device) -> _Fresh:
    lengths = np.array([span.length for span in spans])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    firsts, rows = (np.repeat([getattr(span, name) for span in spans], lengths) for name in ("first", "row"))
    is_even = len(set(lengths.tolist())) == 1
    bounds = torch.from_numpy(offsets.astype(np.int32)).to(device)
    sequences = Sequences(tuple(lengths.tolist()), bounds, int(lengths.max()), is_even)
    at, row, position = (torch.from_numpy(part).to(device) for part in (firsts + positions, rows, positions))
    return _Fresh(sequences, at, row, position)
