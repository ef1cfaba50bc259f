"""What can be wrong with one row of a data file."""

from __future__ import annotations

from typing import Literal

RowProblem = Literal["schema", "empty", "label", "template", "truncated"]
"""What kind of fault a row has: a field that is missing or of a wrong type or order; nothing to learn from; an unknown
class; a conversation that the base's chat template refuses; every label lost to truncation."""


class RowError(Exception):
    """One row that cannot be trained on. Whoever reads the file adds the line number.

    Args:
        field: Where in the row, as a path: "messages[2].content".
        found: What stands there.
        expected: What should stand there.
        fix: What to do about it, as an instruction.
        kind: Groups equal faults in a report.
    """

    def __init__(self, field: str, found: str, expected: str = "", fix: str = "", kind: RowProblem = "schema") -> None:
        self.field = field
        self.found = found
        self.expected = expected
        self.fix = fix
        self.kind: RowProblem = kind
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The whole fault in one line."""
        text = f"{self.field}: {self.found}" if self.field else self.found
        if self.expected:
            text += f"; expected {self.expected}"
        if self.fix:
            text += f"; to fix: {self.fix}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by their args alone, which hold the message; a checker in another process needs the fields.
        return (type(self), (self.field, self.found, self.expected, self.fix, self.kind))


def preview(value: object, limit: int = 60) -> str:
    """A value as a short text for a message: its repr, cut at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
