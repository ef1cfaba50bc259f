"""Judging a reply."""

from __future__ import annotations

from luthier.tasks.defaults import exact_match

__all__ = ["exact_match"]
