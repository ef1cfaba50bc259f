"""Fixtures that the methods share with the engine's tests."""

from __future__ import annotations

from engine.conftest import make_examples  # noqa: F401
