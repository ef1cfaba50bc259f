"""Small training steps as captured CUDA graphs.

Shapes: T padded tokens, N padded sequences, S padded slots.

Below some thousand tokens a step is bound by launching its kernels, not by running them. Such a batch is padded up to a
bucket: filler tokens at its end form a sequence of no slot, and carry no loss. One graph a bucket then serves any
lengths and any slots, for all that differs lies in memory that the graph reads. A bucket is captured when it comes up
for the `MIN_USES`th time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.base.fast_body import FastBody
from luthier.base.load import Base
from luthier.engine.bank import Routing
from luthier.engine.pack import PackedBatch
from luthier.objectives.language_modelling import TokenScores
from luthier.ops.block import Run
from luthier.ops.capability import kernels_problem
from luthier.ops.flat_attention import Sequences
from luthier.ops.low_rank import SlotFactors, StaticUpdates, padded_rank, pinned

MAX_TOKENS = 4096
"""Larger batches keep the GPU busy without a graph."""

MIN_USES = 3
MAX_GRAPHS = 12
TOKEN_STEP, SEQUENCE_STEP, LENGTH_STEP = 256, 8, 256


@dataclass(frozen=True)
class Bucket:
    """What a graph is captured for. All are upper bounds that batches are padded to."""

    num_tokens: int
    num_sequences: int
    longest: int
    num_slots: int
    max_ranks: tuple[int, ...]


def bucket_of(batch: PackedBatch, slots: list[SlotFactors]) -> Bucket:
    """The bucket that a batch belongs to."""
    num_tokens = _up(batch.num_tokens, TOKEN_STEP)
    filler = num_tokens - batch.num_tokens
    ranks_L = np.stack([slot.ranks_L for slot in slots]).max(axis=0).tolist()
    return Bucket(
        num_tokens,
        _up(batch.num_sequences + 1, SEQUENCE_STEP),
        _up(max(batch.max_length, filler), LENGTH_STEP),
        1 << (len(slots) - 1).bit_length(),
        tuple(padded_rank(rank) if rank else 0 for rank in ranks_L),
    )


class StepGraphs:
    """Captured steps of `base`, by bucket; those least recently used go first."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._graphs: OrderedDict[Bucket, StepGraph] = OrderedDict()
        self._uses: dict[Bucket, int] = {}
        self._pool: Any = None

    def run(self, batch: PackedBatch, scale_P: Callable[[], Tensor], routing: Routing) -> TokenScores | None:
        """Train on the batch by a graph, or None where it does not take one; then nothing has happened."""
        found = self._slots(batch, routing)
        if found is None:
            return None
        bounds, slots = found
        bucket = bucket_of(batch, slots)
        self._uses[bucket] = self._uses.get(bucket, 0) + 1
        if bucket not in self._graphs:
            if self._uses[bucket] < MIN_USES:
                return None
            self._make_room()
            self._graphs[bucket] = StepGraph(self.base.fast_body, bucket, self.base.device)  # type: ignore[arg-type]
            self._pool = self._graphs[bucket].capture(self._pool)
        self._graphs.move_to_end(bucket)
        return self._graphs[bucket].run(batch, scale_P(), bounds, slots)

    def clear(self) -> None:
        """Give the graphs' memory back."""
        self._graphs.clear()
        self._pool = None

    def _make_room(self) -> None:
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)

    def _slots(self, batch: PackedBatch, routing: Routing) -> tuple[list[tuple[int, int]], list[SlotFactors]] | None:
        base, body = self.base, self.base.fast_body
        if (
            body is None
            or set(body.keeps) != {"all"}
            or batch.num_tokens > MAX_TOKENS
            or base.longrope_limit is not None
        ):
            return None
        if batch.class_at_C.numel() or not batch.target_at_P.numel() or not base.head_is_plain:
            return None
        if batch.pairs is not None:  # how a token of a pair weighs shows only once all of them are computed
            return None
        slots = [base.bank.slots.get(segment.slot) for segment in batch.segments]
        if any(slot is not None and (slot.saved_modules or slot.token_rows or slot.head) for slot in slots):
            return None
        if not base.bank.head_is_plain_for(batch.segments):
            return None
        found = body.slots_for(routing)
        return found if found is not None and found[1] else None


class StepGraph:
    """One bucket's inputs, graph and outputs."""

    def __init__(self, body: FastBody, bucket: Bucket, device: torch.device) -> None:
        self.body, self.bucket, self.device = body, bucket, device
        size = bucket.num_tokens

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.tokens_T, self.positions_T = zeros(size, torch.int64), zeros(size, torch.int64)
        self.targets_T, self.scale_T = zeros(size, torch.int64), zeros(size, torch.float32)
        self.offsets_N1 = zeros(bucket.num_sequences + 1, torch.int32)
        self.updates = StaticUpdates(bucket.num_slots, size, bucket.max_ranks, device)
        self.lengths: tuple[int, ...] = ()
        self.graph: Any = None
        self.nll_T = self.is_correct_T = self.scale_T

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """The step over the inputs as they are."""
        sequences = Sequences(self.lengths, self.offsets_N1, self.bucket.longest)
        run = Run(self.updates, sequences, self.scale_T, self.scale_T)
        return self.body.train(self.tokens_T, self.positions_T, run, self.targets_T, self.scale_T)

    def capture(self, pool: Any) -> Any:
        """Record the step; no slot is filled in yet, so that nothing is trained by it. Returns the memory pool."""
        even = np.minimum(
            np.arange(self.bucket.num_sequences + 1, dtype=np.int32) * self.bucket.longest, self.bucket.num_tokens
        )
        self.offsets_N1.copy_(torch.from_numpy(even))
        self.offsets_N1[-1] = self.bucket.num_tokens
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.nll_T, self.is_correct_T = self.step()
        return self.graph.pool()

    def run(
        self, batch: PackedBatch, scale_P: Tensor, bounds: list[tuple[int, int]], slots: list[SlotFactors]
    ) -> TokenScores:
        """Train on `batch`; the scores of its supervised positions, valid until the next run of any graph."""
        self._fill(batch, scale_P)
        self.updates.fill(bounds, slots)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.nll_T, self.is_correct_T = self.step()
        return TokenScores(
            self.nll_T.index_select(0, batch.target_at_P), self.is_correct_T.index_select(0, batch.target_at_P)
        )

    def _fill(self, batch: PackedBatch, scale_P: Tensor) -> None:
        # Tokens of an earlier batch may stay behind this one's: nothing reads them, and they carry no loss.
        used = batch.num_tokens
        self.tokens_T[:used].copy_(batch.tokens_T)
        self.positions_T[:used].copy_(batch.positions_T)
        self.scale_T.zero_()
        self.scale_T.index_copy_(0, batch.target_at_P, scale_P.to(torch.float32))
        self.targets_T.index_copy_(0, batch.target_at_P, batch.target_token_P)
        self.lengths = (*batch.lengths, self.bucket.num_tokens - used)
        offsets = np.full(self.bucket.num_sequences + 1, self.bucket.num_tokens, dtype=np.int32)
        offsets[: batch.num_sequences + 1] = np.concatenate([[0], np.cumsum(batch.lengths)])
        self.offsets_N1.copy_(pinned(offsets, self.device), non_blocking=True)


def build_step_graphs(base: Base) -> StepGraphs | None:
    """Graphs for `base`, where its body runs by kernels on a GPU."""
    return StepGraphs(base) if has_graphs(base) else None


def has_graphs(base: Base) -> bool:
    """Whether steps on `base` can be captured."""
    on_gpu = base.device.type == "cuda" and not kernels_problem()
    return on_gpu and base.fast_body is not None and base.dtype == torch.bfloat16


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
