"""A frozen linear layer's two products without autograd, however its weight is held.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from luthier.ops.nf4 import FrozenWeight
from luthier.ops.product import backward_product, forward_product


class LinearModule(Protocol):
    """A module that computes W x + b with a frozen W, plain or quantized."""

    @property
    def weight(self) -> FrozenWeight: ...

    @property
    def bias(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """The products of `module`. Its weight is looked up at each of them, for it may be rounded later."""

    module: LinearModule

    def forward(self, x_TI: Tensor) -> Tensor:
        """x W^T + b, a fresh [T, O]."""
        return forward_product(x_TI, self.module.weight, self.module.bias)

    def backward(self, grad_TO: Tensor, into_TI: Tensor | None = None) -> Tensor:
        """g W, [T, I]; added to `into_TI` in place where that is given."""
        weight_OI = self.module.weight
        if into_TI is None:
            return backward_product(grad_TO, weight_OI)
        if isinstance(weight_OI, Tensor) and grad_TO.is_cuda:
            return into_TI.addmm_(grad_TO, weight_OI)
        return into_TI.add_(backward_product(grad_TO, weight_OI))
