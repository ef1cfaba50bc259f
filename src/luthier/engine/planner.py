"""From pending work to the next forward: a pure function.

Every job offers its next micro-batch, whose bounds are its own affair. The planner chooses which of them share the next
forward: the job that has been served least per unit of its share comes first, and others join while the budget lasts.
So a job with small batches never waits behind a large one for long, and none is starved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offer:
    """One job's next micro-batch.

    Attributes:
        job: The job's name.
        num_tokens: Tokens in the micro-batch.
        num_tokens_served: Tokens that the engine has run for the job since it came.
        share: The job's weight against the others'; twice the share gets twice the tokens.
        longest: Tokens of its longest sequence.
    """

    job: str
    num_tokens: int
    num_tokens_served: int
    share: float = 1.0
    longest: int = 0


def plan(offers: Sequence[Offer], budget_tokens: int) -> list[str]:
    """The jobs whose micro-batches make up the next forward: at least one, together at most `budget_tokens`.

    A micro-batch larger than the budget runs alone.
    """
    order = sorted(offers, key=lambda offer: (offer.num_tokens_served / offer.share, offer.job))
    chosen: list[str] = []
    room = budget_tokens
    for offer in order:
        if not chosen or offer.num_tokens <= room:
            chosen.append(offer.job)
            room -= offer.num_tokens
    return chosen
