"""Importing what is heavy, and leaving it behind at the end: torch and transformers are 700,000 objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and what stands on it without looking for garbage meanwhile.

    Nothing that an import makes is garbage, and Python's collector would walk all of it again and again: a quarter of
    the time that a start takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def forget_objects() -> None:
    """Before a process ends: leave its objects to the system, which frees them at once, not to a last collection."""
    gc.freeze()
