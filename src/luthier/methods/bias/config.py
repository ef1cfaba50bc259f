"""BitFit's fields in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from luthier.methods.exclusive.config import ExclusiveConfig
from luthier.types import ExclusiveSpec


class BiasConfig(ExclusiveConfig):
    """BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): the biases alone are trained. It has no fields of its own."""

    type: Literal["bias"] = "bias"
    usual_learning_rate: ClassVar[float] = 1e-3

    def exclusive_spec(self) -> ExclusiveSpec:
        return ExclusiveSpec("bias")
