"""A frozen linear layer's two products without autograd, however its weight is held.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luthier.ops.nf4 import FrozenWeight
from luthier.ops.product import backward_product, forward_product


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """Weight [O, I], plain or quantized, and bias [O]."""

    weight_OI: FrozenWeight
    bias_O: Tensor | None

    def forward(self, x_TI: Tensor) -> Tensor:
        """x W^T + b, a fresh [T, O]."""
        return forward_product(x_TI, self.weight_OI, self.bias_O)

    def backward(self, grad_TO: Tensor, into_TI: Tensor | None = None) -> Tensor:
        """g W, [T, I]; added to `into_TI` in place where that is given."""
        if into_TI is None:
            return backward_product(grad_TO, self.weight_OI)
        if isinstance(self.weight_OI, Tensor) and grad_TO.is_cuda:
            return into_TI.addmm_(grad_TO, self.weight_OI)
        return into_TI.add_(backward_product(grad_TO, self.weight_OI))
