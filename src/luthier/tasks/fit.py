"""Fitting sequences into the longest length that a job trains on, without losing labels in silence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.task import Truncation
from luthier.types import Example

Sequence_ = tuple[NDArray[np.int32], NDArray[np.float32]]


def fit(
    sequences: Sequence[Sequence_], renderer: Renderer, max_length: int, truncation: Truncation, row: int
) -> list[Example]:
    """Make examples of one row's sequences, each at most `max_length` tokens long.

    Args:
        sequences: (tokens int32 [length], weights float32 [length]) pairs.
        renderer: Tells BOS, which a cut at the start keeps.
        max_length: Most tokens in one example.
        truncation: See `Task.examples`. "drop" leaves out each sequence that is too long.
        row: Index of the row.

    Returns:
        Examples that each hold a label. Empty only where "drop" left out all.

    Raises:
        RowError: kind "truncated" where a sequence is too long and `truncation` is "error", or where cutting would
            leave no label in any.
    """
    longest = max(len(tokens) for tokens, _ in sequences)
    if truncation == "error" and longest > max_length:
        raise too_long(longest, max_length)
    kept = [pair for pair in sequences if len(pair[0]) <= max_length or truncation != "drop"]
    cut = [cut_to(tokens, weights, renderer.bos_id, max_length, truncation) for tokens, weights in kept]
    examples = [Example(tokens, weights, row=row) for tokens, weights in cut if weights.any()]
    if kept and not examples:
        raise RowError(
            "",
            f"the row is {longest} tokens long, and its first {max_length} hold nothing to learn"
            if truncation == "end"
            else f"the row is {longest} tokens long, and cutting it to {max_length} leaves nothing to learn",
            "at least one supervised token within train.max_length",
            "raise train.max_length, set train.truncation to start, or shorten the row",
            kind="truncated",
        )
    return examples


def cut_to(
    tokens: NDArray[np.int32], weights: NDArray[np.float32], bos_id: int | None, max_length: int, truncation: Truncation
) -> Sequence_:
    """Cut one sequence at its end or start. A cut at the start keeps a BOS that stood there."""
    if len(tokens) <= max_length:
        return tokens, weights
    if truncation != "start":
        return tokens[:max_length].copy(), weights[:max_length].copy()
    keep_bos = bos_id is not None and int(tokens[0]) == bos_id
    tail = max_length - keep_bos
    tokens = np.concatenate([tokens[: int(keep_bos)], tokens[len(tokens) - tail :]])
    weights = np.concatenate([weights[: int(keep_bos)], weights[len(weights) - tail :]])
    weights[0] = 0.0  # what now stands first has nothing before it to be predicted from
    return tokens, weights


def too_long(num_tokens: int, max_length: int) -> RowError:
    """The complaint of `truncation: error`."""
    return RowError(
        "",
        f"the row is {num_tokens} tokens long",
        f"at most {max_length} (train.max_length)",
        "raise train.max_length, shorten the row, or set train.truncation to drop, end or start",
        kind="truncated",
    )
