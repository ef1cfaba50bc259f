"""What the configs of all exclusive methods have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

from luthier.strict import Strict
from luthier.types import ExclusiveSpec


class ExclusiveConfig(Strict):
    """A method that must own its base: it runs in a process of its own, on a copy of the base of its own."""

    runs: ClassVar[Literal["bank", "exclusive"]] = "exclusive"
    usual_learning_rate: ClassVar[float]
    """AdamW's peak rate that a comparison takes where the recipe's own is for methods of another magnitude."""

    @property
    def quantization(self) -> Literal["nf4"] | None:
        """Own weights and PEFT's layers train over plain weights."""
        return None

    @property
    def new_tokens(self) -> list[str]:
        """Exclusive methods add none to the vocabulary."""
        return []

    def exclusive_spec(self) -> ExclusiveSpec:
        """The plain values for the engine; classes and steps are filled in once the data is known."""
        raise NotImplementedError
