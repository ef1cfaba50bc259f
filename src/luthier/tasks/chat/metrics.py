"""Judging a reply."""

from __future__ import annotations


def exact_match(reply: str, reference: str) -> bool:
    """Whether the reply is the reference, white space around either aside. Nothing else is forgiven."""
    return reply.strip() == reference.strip()
