"""Judging on documents: by the mean loss a token."""

from __future__ import annotations

import math


def perplexity(mean_nll: float) -> float:
    """e to the mean negative log likelihood (in nats a token); infinite where that overflows."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
