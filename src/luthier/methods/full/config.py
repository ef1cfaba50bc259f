"""Full fine-tuning's fields in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from luthier.methods.exclusive.config import ExclusiveConfig
from luthier.types import ExclusiveSpec


class FullConfig(ExclusiveConfig):
    """Full fine-tuning: every weight of a copy of the base is trained. It has no fields of its own."""

    type: Literal["full"] = "full"
    usual_learning_rate: ClassVar[float] = 2e-5

    def exclusive_spec(self) -> ExclusiveSpec:
        return ExclusiveSpec("full")
