"""The fields of training the last blocks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from luthier.methods.exclusive.config import ExclusiveConfig
from luthier.types import ExclusiveSpec


class LastLayersConfig(ExclusiveConfig):
    """Train the last blocks in full, with the final norm and, where it is not the embedding too, the output layer."""

    type: Literal["last_layers"] = "last_layers"
    usual_learning_rate: ClassVar[float] = 5e-5
    layers: int = Field(default=4, ge=1)
    """Blocks to train, counted from the output."""

    def exclusive_spec(self) -> ExclusiveSpec:
        return ExclusiveSpec("last_layers", num_layers=self.layers)
