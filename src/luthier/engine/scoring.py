"""Scores of many examples, forward only; and what a preference job's reference makes of its pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from luthier.base.load import Base
from luthier.engine.pack import PackItem, pack
from luthier.engine.step import SequenceReport, score
from luthier.types import Example, Examples

SCORE_TOKENS = 4096
"""Tokens in one forward while scoring."""

CHUNK_EXAMPLES = 512
"""Examples in memory at a time while the reference is asked."""


def score_examples(
    base: Base,
    examples: Sequence[Example],
    slot: int,
    on_done: Callable[[int], None] = lambda done: None,
    max_tokens: int = SCORE_TOKENS,
) -> list[SequenceReport]:
    """Forward-only scores of each example, in order; similar lengths run together where the base pads."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    reports: list[SequenceReport | None] = [None] * len(examples)
    start = 0
    while start < len(order):
        end, tokens = start, 0
        while end < len(order) and (end == start or tokens + examples[order[end]].num_tokens <= max_tokens):
            tokens += examples[order[end]].num_tokens
            end += 1
        batch = pack([PackItem(examples[i], slot) for i in order[start:end]], base.device)
        for i, report in zip(order[start:end], score(base, batch), strict=True):
            reports[i] = report
        start = end
        on_done(end)
    return [report for report in reports if report is not None]


def reference_margins(
    base: Base,
    examples: Examples,
    slot: int,
    on_done: Callable[[int], None] = lambda done: None,
    max_tokens: int = SCORE_TOKENS,
) -> NDArray[np.float64]:
    """float64 [num_examples]: log p(chosen) - log p(rejected) of each pair, in nats: what `Pair.reference` holds.

    Args:
        slot: The reference: `BASE_SLOT`, or a slot as it is now.
        on_done: Told of the pairs done.
    """
    margins = np.empty(len(examples), dtype=np.float64)
    for start in range(0, len(examples), CHUNK_EXAMPLES):
        chunk = [examples[i] for i in range(start, min(start + CHUNK_EXAMPLES, len(examples)))]

        def note(done: int, start: int = start) -> None:
            on_done(start + done)

        for i, report in enumerate(score_examples(base, chunk, slot, note, max_tokens), start):
            if report.pair is None:
                raise ValueError(f"example {i} is no preference pair")
            margins[i] = report.pair.chosen_logprob - report.pair.rejected_logprob
    return margins
