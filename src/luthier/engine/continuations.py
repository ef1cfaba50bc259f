"""How likely each of several continuations of a prompt is: the prompt's rows are computed once, and all share them.

    log p(c | prompt) = sum_i log p(c_i | prompt, c_<i)

Continuations that begin alike share those rows too: their tokens are the nodes of a tree, and each node's logits are
computed once. So a text costs its prompt and at most the sum of its continuations' tokens. There are two ways to it:

- On a CPU the body by blocks computes rows that sequences have in common once (`live_rows`); the branches of the tree
  go through it as sequences of one batch, those of several prompts together.
- Elsewhere the prompt goes through a key-value cache, whose row is copied for each branch; on a GPU only a long one,
  for there a branch behind a cache costs its launches, and computing a short prompt again costs less.

A base that runs padded has neither: each branch is run as a whole, which is right and slow.

Shapes: T tokens of a forward, P nodes, V vocabulary, K continuations of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.base.load import Base, Forward
from luthier.engine.cache import RowCache
from luthier.engine.pack import PackedBatch, PackItem, Segment, pack
from luthier.errors import DataError
from luthier.objectives.language_modelling import CHUNK_BYTES
from luthier.ops.product import forward_product
from luthier.types import Example

MAX_TOKENS = 4096
"""Tokens computed in one forward."""

LAID_OUT = 8
"""Where rows are shared, a forward may lay out this many times as many tokens as it computes."""

MAX_ROWS = 64
"""Branches that go on from a cached prompt in one forward."""

REPEATED_TOKENS = {"cuda": 256}
"""By the device's type, so many tokens of a prompt are computed again for each branch rather than cached; elsewhere 0.
A branch behind a cache attends by itself: some hundred launches over all layers, about as long as so many more rows of
a large product."""

Path = tuple[int, ...]
"""The tokens of a continuation up to a node; empty at the prompt's last token."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt (int32 [length], at least one token) and its continuations, none of them empty."""

    tokens: NDArray[np.int32]
    continuations: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class _Tree:
    """Some of a prompt's continuations, on their way through the base.

    Attributes:
        index: Of the prompt.
        prompt: Its tokens.
        wanted: (continuation, node, the token to come there).
        branches: Continuations that together pass through every node.
    """

    index: int
    prompt: NDArray[np.int32]
    wanted: tuple[tuple[int, Path, int], ...]
    branches: tuple[Path, ...]

    @property
    def num_laid_out(self) -> int:
        return sum(len(self.prompt) + len(branch) for branch in self.branches)

    @property
    def num_computed(self) -> int:
        """At most, where rows are shared."""
        return len(self.prompt) + sum(map(len, self.branches))


@torch.inference_mode()
def score_continuations(
    base: Base,
    asked: Sequence[Asked],
    slot: int,
    on_done: Callable[[int], None] = lambda done: None,
    max_tokens: int = MAX_TOKENS,
) -> list[NDArray[np.float64]]:
    """The log-likelihood of every continuation, in nats.

    Args:
        slot: The slot of the bank, or `BASE_SLOT`.
        on_done: Told now and then how many prompts are done.
        max_tokens: Most tokens computed in one forward; a single prompt may have more.

    Returns:
        float64 [K] a prompt, in order.

    Raises:
        DataError: where a prompt and its continuation have more tokens than the base takes.
        ValueError: for a prompt or a continuation without tokens.
    """
    for index, one in enumerate(asked):
        _check(base, index, one)
    scores = [np.zeros(len(one.continuations)) for one in asked]
    longest = max((len(one.tokens) + max(map(len, one.continuations)) for one in asked), default=0)
    shares = base.shares_rows(slot, longest)
    repeated = REPEATED_TOKENS.get(base.device.type, 0)
    room = max_tokens * LAID_OUT if shares else max_tokens
    # Prompts of like length stand together: a base that pads wastes least.
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].tokens))
    place = {index: at for at, index in enumerate(order)}
    limit = base.longrope_limit
    trees = (tree for index in order for tree in _trees(asked[index], index, room, limit))
    for group in _groups(trees, max_tokens, room):
        whole = []
        for tree in group:
            if base.is_packed and not shares and len(tree.prompt) > repeated:
                _score_by_cache(base, tree, slot, scores)
            else:
                whole.append(tree)
        if whole:
            _score_together(base, whole, slot, scores)
        on_done(place[group[-1].index] + 1)
    return scores


def _check(base: Base, index: int, one: Asked) -> None:
    if not len(one.tokens) or not one.continuations or not all(one.continuations):
        raise ValueError(f"prompt {index} or one of its continuations has no tokens")
    longest = len(one.tokens) + max(map(len, one.continuations))
    if base.max_positions is not None and longest > base.max_positions:
        raise DataError(
            f"a prompt and the continuation to score have {longest:,} tokens",
            f"at most {base.max_positions:,}, which this base takes",
            "shorten the text, or take a base with a longer context",
        )


# -- the tree


def _trees(one: Asked, index: int, room: int, limit: int | None) -> Iterator[_Tree]:
    """The continuations of one prompt, in as many parts as `room` tokens laid out ask for.

    Args:
        limit: LongRoPE turns the whole of a longer sequence by other factors, so that it shares no row with a shorter.
    """

    def is_long(k: int) -> bool:
        return limit is not None and len(one.tokens) + len(one.continuations[k]) > limit

    # Who begins alike stands together.
    order = sorted(range(len(one.continuations)), key=lambda k: (is_long(k), one.continuations[k]))
    part: list[int] = []
    laid_out = 0
    for k in order:
        size = len(one.tokens) + len(one.continuations[k])
        if part and (laid_out + size > room or is_long(k) != is_long(part[0])):
            yield _tree(one, index, part)
            part, laid_out = [], 0
        part.append(k)
        laid_out += size
    yield _tree(one, index, part)


def _tree(one: Asked, index: int, part: Sequence[int]) -> _Tree:
    wanted = tuple((k, one.continuations[k][:at], token) for k in part for at, token in enumerate(one.continuations[k]))
    nodes = {path for _, path, _ in wanted}
    # A node that no longer node goes through ends a branch; any continuation that passes it stands for the branch.
    inner = {path[:at] for path in nodes for at in range(len(path))}
    ends = {one.continuations[k][:-1]: one.continuations[k] for k in part}
    return _Tree(index, one.tokens, wanted, tuple(ends[path] for path in sorted(nodes - inner)))


def _groups(trees: Iterator[_Tree], max_tokens: int, room: int) -> Iterator[list[_Tree]]:
    """Trees that go through the base together."""
    group: list[_Tree] = []
    for tree in trees:
        computed = sum(other.num_computed for other in group) + tree.num_computed
        laid_out = sum(other.num_laid_out for other in group) + tree.num_laid_out
        if group and (computed > max_tokens or laid_out > room):
            yield group
            group = []
        group.append(tree)
    if group:
        yield group


# -- by sequences that share rows


def _score_together(base: Base, group: Sequence[_Tree], slot: int, scores: list[NDArray[np.float64]]) -> None:
    """Every branch as a sequence; which rows need computing is the body's affair."""
    items, nodes, wanted = [], list[int](), list[tuple[int, int, int, int]]()
    first = 0
    for tree in group:
        at: dict[Path, int] = {}
        for branch in tree.branches:
            tokens = np.concatenate([tree.prompt, np.asarray(branch, dtype=np.int32)])
            weights = np.zeros(len(tokens), dtype=np.float32)
            weights[len(tree.prompt) :] = 1.0  # the rows before these are read
            items.append(PackItem(Example(tokens, weights), slot))
            for length in range(len(branch)):
                if branch[:length] not in at:
                    at[branch[:length]] = len(nodes)
                    nodes.append(first + len(tree.prompt) - 1 + length)
            first += len(tokens)
        wanted += [(tree.index, k, at[path], token) for k, path, token in tree.wanted]
    batch = pack(items, base.device)
    _add(base, batch, slot, nodes, wanted, scores, None)


# -- by a cached prompt


def _score_by_cache(base: Base, tree: _Tree, slot: int, scores: list[NDArray[np.float64]]) -> None:
    cache, start = RowCache(), len(tree.prompt)
    total = start + max(map(len, tree.branches))
    batch = _batch(base, [tree.prompt], slot, 0)
    cache.begin(batch, rows=[0], starts=[0], totals=[total])
    root = [(tree.index, k, 0, token) for k, path, token in tree.wanted if not path]
    _add(base, batch, slot, [start - 1], root, scores, cache)
    left = [branch[:-1] for branch in tree.branches if len(branch) > 1]
    seen: set[Path] = set()
    for first in range(0, len(left), MAX_ROWS):
        part = left[first : first + MAX_ROWS]
        rows = list(range(1, len(part) + 1))
        for row in rows:
            cache.copy(0, row, start)
        batch = _batch(base, [np.asarray(path, dtype=np.int32) for path in part], slot, start)
        cache.begin(batch, rows=rows, starts=[start] * len(part), totals=[total] * len(part))
        at: dict[Path, int] = {}
        nodes, offset = list[int](), 0
        for path in part:
            for length in range(1, len(path) + 1):
                if path[:length] not in at and path[:length] not in seen:
                    at[path[:length]] = len(nodes)
                    nodes.append(offset + length - 1)
            offset += len(path)
        seen |= at.keys()
        wanted = [(tree.index, k, at[path], token) for k, path, token in tree.wanted if path in at]
        _add(base, batch, slot, nodes, wanted, scores, cache)


def _batch(base: Base, sequences: Sequence[NDArray[np.int32]], slot: int, start: int) -> PackedBatch:
    items = [PackItem(Example(tokens, np.zeros(len(tokens), dtype=np.float32)), slot) for tokens in sequences]
    batch = pack(items, base.device)
    return replace(batch, positions_T=batch.positions_T + start)


# -- a forward


def _add(
    base: Base,
    batch: PackedBatch,
    slot: int,
    nodes: Sequence[int],
    wanted: Sequence[tuple[int, int, int, int]],
    scores: list[NDArray[np.float64]],
    cache: RowCache | None,
) -> None:
    """Run the batch and add the log-likelihoods up.

    Args:
        nodes: Flat index of each of the P nodes.
        wanted: (prompt, continuation, node, token to come).
    """
    at_P = torch.tensor(nodes, dtype=torch.int64, device=base.device)
    routing = replace(base.routing(batch, training=False), head_segments=(Segment(slot, 0, len(nodes)),))
    with base.bank.routed(routing):
        result = base.forward(batch, keep=at_P, cache=cache, only_scored=cache is None)
    of_node: list[list[tuple[int, int, int]]] = [[] for _ in nodes]
    for index, k, node, token in wanted:
        of_node[node].append((index, k, token))
    num_rows = max(8, CHUNK_BYTES // (4 * base.vocabulary_size))
    for start in range(0, len(nodes), num_rows):
        logits_cV = _logits(base, result, at_P[start : start + num_rows], slice(start, start + num_rows), slot)
        wide_cV = logits_cV.to(torch.promote_types(logits_cV.dtype, torch.float32))
        total_c = wide_cV.logsumexp(dim=-1)
        flat = [(row, index, k, token) for row in range(wide_cV.shape[0]) for index, k, token in of_node[start + row]]
        rows_W = torch.tensor([row for row, *_ in flat], device=base.device)
        tokens_W = torch.tensor([token for *_, token in flat], device=base.device)
        found_W = (wide_cV[rows_W, tokens_W] - total_c[rows_W]).double().tolist()
        for (_, index, k, _), value in zip(flat, found_W, strict=True):
            scores[index][k] += value


def _logits(base: Base, result: Forward, at_c: Tensor, rows: slice, slot: int) -> Tensor:
    """Logits [c, V] of some nodes."""
    if result.logits_PV is not None:
        return result.logits_PV[rows]
    hidden_cD = result.hidden_TD[at_c]
    segments = (Segment(slot, 0, hidden_cD.shape[0]),)
    if base.bank.head_is_plain_for(segments):
        return forward_product(hidden_cD, base.head_weight_VD, base.head_bias_V)
    return base.logits(hidden_cD, segments)
