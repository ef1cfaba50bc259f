"""Steps of sampling in which every reply brings one token, as captured CUDA graphs.

Shapes: P rows of a step with filler, V vocabulary.

Such a step is bound by launching its kernels. Its rows are padded up to a bucket with filler that stores nothing and
sees nothing; one graph a bucket then serves any slots and any lengths, for tokens, rows of the cache, lengths and the
slots' factors lie in memory that the graph reads. The keys and values lie there as well, so a cache that has grown is
captured anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.base.fast_body import FastBody
from luthier.base.load import Base
from luthier.engine.bank import Routing
from luthier.engine.cache import RowCache
from luthier.engine.graphs import has_graphs
from luthier.engine.pack import segments_of
from luthier.ops.block import Run
from luthier.ops.cached_attention import CachedLayer
from luthier.ops.flat_attention import Sequences
from luthier.ops.low_rank import SlotFactors, StaticUpdates, padded_rank, pinned

MIN_USES = 3
"""A bucket is captured when it comes up for this many times."""

MAX_GRAPHS = 12
ROW_STEP = 16
"""Buckets past this many rows are multiples of it; below they are powers of two."""

Adapted = tuple[list[tuple[int, int]], list[SlotFactors]]
"""Rows of each adapted slot, and its factors."""


@dataclass(frozen=True)
class Bucket:
    """What a graph is captured for: rows, places for slots, and per layer the largest padded rank."""

    num_rows: int
    num_slots: int
    max_ranks: tuple[int, ...]


def bucket_of(num_rows: int, slots: Sequence[SlotFactors]) -> Bucket:
    """The bucket of a step of so many rows of these slots."""
    rows = 1 << (num_rows - 1).bit_length() if num_rows <= ROW_STEP else -(-num_rows // ROW_STEP) * ROW_STEP
    if not slots:
        return Bucket(rows, 0, ())
    ranks_L = np.stack([slot.ranks_L for slot in slots]).max(axis=0).tolist()
    ranks = tuple(padded_rank(rank) if rank else 0 for rank in ranks_L)
    return Bucket(rows, 1 << (len(slots) - 1).bit_length(), ranks)


class ReplyGraphs:
    """Captured steps over `cache`, by bucket; those least recently used go first.

    Args:
        captures: Whether steps are captured; without a GPU the padded steps run as they are.
    """

    def __init__(self, base: Base, cache: RowCache, *, captures: bool = True) -> None:
        self.base = base
        self.cache = cache
        self.captures = captures
        self._graphs: OrderedDict[Bucket, ReplyGraph] = OrderedDict()
        self._uses: dict[Bucket, int] = {}
        self._pool: Any = None
        self._stored: list[tuple[Tensor, Tensor]] = []
        self._generation = -1
        self._unchanged: set[int] = set()
        self._last: tuple[tuple[int, ...], Adapted, Bucket] | None = None

    def run(
        self, slots: Sequence[int], tokens: Sequence[int], rows: Sequence[int], ends: Sequence[int]
    ) -> Tensor | None:
        """Logits of one more token of each row, valid until the next run; None where no graph takes this step.

        Args:
            slots: Slot of each token; tokens of one slot stand together.
            rows: Their rows of the cache.
            ends: Positions of each one's sequence with the token itself; all the others are stored.
        """
        found = self._adapted(tuple(slots))
        if found is None:
            return None
        adapted, bucket = found
        self._uses[bucket] = self._uses.get(bucket, 0) + 1
        if self._uses[bucket] < MIN_USES:
            return None
        self._hold(max(rows) + 1, max(ends))
        if bucket not in self._graphs:
            self._graphs[bucket] = self._captured(bucket)
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(bucket)
        return self._graphs[bucket].run(tokens, rows, ends, adapted)

    def renew(self, slot: int) -> None:
        """Take the slot's factors as they are from now on: it may have trained since they were last read."""
        self._unchanged.discard(slot)
        self._last = None

    def clear(self) -> None:
        """Give the graphs' memory back, and the cache's."""
        self._drop_graphs()
        self._stored, self._generation = [], -1

    def _adapted(self, slots: tuple[int, ...]) -> tuple[Adapted, Bucket] | None:
        if self._last is not None and self._last[0] == slots:
            return self._last[1:]
        base, segments = self.base, segments_of(slots)
        if base.fast_body is None or not base.bank.head_is_plain_for(segments):
            return None
        held = [base.bank.slots.get(segment.slot) for segment in segments]
        if any(slot is not None and (slot.saved_modules or slot.token_rows or slot.head) for slot in held):
            return None
        adapted = base.fast_body.slots_for(Routing(segments), unchanged=self._unchanged)
        if adapted is None:
            return None
        self._unchanged |= set(slots)
        self._last = slots, adapted, bucket_of(len(slots), adapted[1])
        return self._last[1:]

    def _hold(self, num_rows: int, num_positions: int) -> None:
        """See to room in the cache; where its storage has become another, what was captured over it goes."""
        generation = self.cache.reserve(num_rows, num_positions)
        if generation != self._generation:
            self._drop_graphs()
            self._stored, self._generation = self.cache.layers(), generation

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        self._pool = None  # a pool ends with the last graph that was captured into it

    def _captured(self, bucket: Bucket) -> ReplyGraph:
        assert self.base.fast_body is not None
        graph = ReplyGraph(self.base.fast_body, bucket, self._stored, self.base.device)
        if self.captures:
            self._pool = graph.capture(self._pool)
        return graph


class ReplyGraph:
    """One bucket's inputs, graph and output."""

    def __init__(
        self, body: FastBody, bucket: Bucket, stored: Sequence[tuple[Tensor, Tensor]], device: torch.device
    ) -> None:
        self.body, self.bucket, self.device = body, bucket, device
        num_rows = bucket.num_rows
        self.inputs_4P = torch.zeros(4, num_rows, dtype=torch.int64, device=device)
        self.tokens_P, self.positions_P, rows_P, ends_P = self.inputs_4P
        self.layers = [CachedLayer(keys, values, rows_P, ends_P) for keys, values in stored]
        offsets_P1 = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self.sequences = Sequences((1,) * num_rows, offsets_P1, 1)
        self.updates = StaticUpdates(bucket.num_slots, num_rows, bucket.max_ranks, device)
        self.filled: Adapted | None = None
        self.graph: Any = None
        self.logits_PV = torch.empty(0, device=device)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The step over the inputs as they are."""
        nothing = torch.empty(0, device=self.device)
        run = Run(self.updates, self.sequences, nothing, nothing)
        return self.body.reply(self.tokens_P, self.positions_P, run, self.layers)

    def capture(self, pool: Any) -> Any:
        """Record the step; all its rows are filler now, so that nothing is stored by it. Returns the memory pool."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits_PV = self.step()
        return self.graph.pool()

    def run(self, tokens: Sequence[int], rows: Sequence[int], ends: Sequence[int], adapted: Adapted) -> Tensor:
        """Logits [number of tokens, V]."""
        used = len(tokens)
        inputs_4P = np.zeros((4, self.bucket.num_rows), dtype=np.int64)
        inputs_4P[:, :used] = tokens, np.array(ends) - 1, rows, ends
        self.inputs_4P.copy_(pinned(inputs_4P, self.device), non_blocking=True)
        if self.filled is not adapted:
            self.updates.fill(*adapted)
            self.filled = adapted
        if self.graph is not None:
            self.graph.replay()
        else:
            self.logits_PV = self.step()
        return self.logits_PV[:used]


def build_reply_graphs(base: Base, cache: RowCache) -> ReplyGraphs | None:
    """Graphs for sampling on `base`, where its body runs by kernels on a GPU and rotates every sequence alike."""
    if not has_graphs(base) or not base.is_packed or not base.head_is_plain or base.longrope_limit is not None:
        return None
    return ReplyGraphs(base, cache)
