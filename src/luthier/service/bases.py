"""What the API must know about bases without loading one: their names, and how their tokenizer cuts a text.

The implementation stands in the composing layer (`luthier.worker.served_bases`), for the service does not know the
engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from luthier.data.template import Renderer


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """A served base.

    Attributes:
        name: As tenants call it.
        owner: Who published it.
        created_at: A fixed date, for lists.
        description: One line.
    """

    name: str
    owner: str
    created_at: int
    description: str


class Bases(Protocol):
    """The bases of an installation."""

    def all(self) -> list[BaseFacts]:
        """Every base that is served."""

    def find(self, name: str) -> BaseFacts | None:
        """One of them by its exact name."""

    def renderer(self, name: str) -> Renderer | None:
        """Tokenizer and chat template, where they are on this machine already; nothing is fetched."""
