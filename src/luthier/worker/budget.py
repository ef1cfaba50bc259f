"""How many held-out rows to judge on, so that judging never costs more than the training.

Costs are counted in forwards of one token: training takes about two (forward, and backward to the inputs), scoring one,
generating one for every token of the prompt and two for every token written, since small batches run less well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_ROWS = 500
SHARE_OF_TRAINING = 0.5


@dataclass(frozen=True, slots=True)
class JudgingBudget:
    """Rows to score, and rows of those to generate for."""

    num_rows: int
    num_generated: int


def choose_budget(
    *,
    num_held_out: int,
    train_tokens: float,
    row_tokens: float,
    reply_tokens: float,
    num_models: int,
    rows: int | None,
    generate_rows: int | None,
    generates: bool,
) -> JudgingBudget:
    """The rows to judge on.

    Args:
        num_held_out: Rows there are.
        train_tokens: Tokens that training runs in all its epochs.
        row_tokens, reply_tokens: Mean tokens of a held-out row, and tokens allowed for a reply.
        num_models: How often each row is judged: base, tuned, and base with examples.
        rows, generate_rows: The user's own numbers; they win.
    """
    allowance = SHARE_OF_TRAINING * 2.0 * train_tokens
    scoring = row_tokens * num_models
    generating = (row_tokens + 2.0 * reply_tokens) * num_models if generates else 0.0
    affordable = int(allowance / max(1.0, scoring + generating))
    chosen = max(1, min(MOST_ROWS, affordable)) if rows is None else rows
    chosen = min(chosen, num_held_out)
    replies = chosen if generate_rows is None else min(generate_rows, chosen)
    return JudgingBudget(chosen, replies if generates else 0)


def spread_rows(num_rows: int, num_chosen: int, seed: int) -> list[int]:
    """`num_chosen` of `num_rows` indices, ascending, the same for the same seed."""
    if num_chosen >= num_rows:
        return list(range(num_rows))
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(num_rows)[:num_chosen])
