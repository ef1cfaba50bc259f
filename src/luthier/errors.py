"""Errors that a user can cause. Each says what was found, what was expected, and what to do.

The command line turns a `LuthierError` into its message and exit code 2; anything else is a defect of Luthier and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LuthierError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        found: What was met, in one clause, with the offending value.
        expected: What should have been there; may be empty where `found` says it all.
        fix: What to do next, as an instruction.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The whole error as text, one line a part."""
        lines = [self.found]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  to fix:   {self.fix}")
        return "\n".join(lines)


class RecipeError(LuthierError):
    """A recipe, a `--set` override or a job request that does not hold."""


class DataError(LuthierError):
    """A data file that cannot be trained on. The report behind it names lines."""


class ModelError(LuthierError):
    """A base or an adapter that is missing, unreadable, or not what it claims."""


class MemoryShortError(LuthierError):
    """A job that does not fit in memory even at its smallest micro-batch."""


class StorageError(LuthierError):
    """Writing failed (full disk, no permission). What was there before is still whole."""


class RunError(LuthierError):
    """A run folder that is missing, of another version, or in a state that forbids the request."""


class ProcessLostError(RunError):
    """Another process of the same run is gone, or cannot be reached. Why, it says itself, or who started it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest known name, as ` (did you mean 'x'?)`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
