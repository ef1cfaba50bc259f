"""Judging a continuation: as a chat reply is judged."""

from __future__ import annotations

from luthier.tasks.chat.metrics import exact_match

__all__ = ["exact_match"]
