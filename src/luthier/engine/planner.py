"""From pending work to the next forward: a pure function.

Every job offers its next micro-batch, whose bounds are its own affair. The planner chooses which of them share the next
forward: the job that has been served least per unit of its share comes first, and others join while the budget lasts.
So a job with small batches never waits behind a large one for long, and none is starved.

Jobs may belong to groups (a tenant's jobs): then the least served group comes first, and within it the least served
job, so that twenty jobs of one owner get no more than the one job of another.
"""

from __future__ import annotations

import math
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
        group: Whose it is; empty for a job by itself.
        num_group_tokens_served, group_share: As the job's own, of its group.
    """

    job: str
    num_tokens: int
    num_tokens_served: int
    share: float = 1.0
    longest: int = 0
    group: str = ""
    num_group_tokens_served: int = 0
    group_share: float = 1.0


def plan(offers: Sequence[Offer], budget_tokens: int, lead_tokens: float = math.inf) -> list[str]:
    """The jobs whose micro-batches make up the next forward: at least one, together at most `budget_tokens`.

    A micro-batch larger than the budget runs alone.

    Args:
        lead_tokens: How far a group may come to lead the least served one, per unit of share. A group further ahead
            waits even where there is room: a forward costs by its tokens, so what it carries for one delays the
            others.
    """
    served = {_group(offer): _group_served(offer) for offer in offers}
    left = list(offers)
    chosen: list[str] = []
    room = budget_tokens
    while left:
        offer = min(left, key=lambda o: (served[_group(o)], o.num_tokens_served / o.share, o.job))
        left.remove(offer)
        if chosen and served[_group(offer)] > min(served.values()) + lead_tokens:
            break
        if not chosen or offer.num_tokens <= room:
            chosen.append(offer.job)
            room -= offer.num_tokens
            served[_group(offer)] += offer.num_tokens / offer.group_share if offer.group else 0.0
    return chosen


def _group(offer: Offer) -> tuple[str, str]:
    return (offer.group, "") if offer.group else ("", offer.job)


def _group_served(offer: Offer) -> float:
    if offer.group:
        return offer.num_group_tokens_served / offer.group_share
    return offer.num_tokens_served / offer.share
