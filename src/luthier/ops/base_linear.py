"""A frozen linear layer of the base as the methods see it: it multiplies, and tells how long its rows are.

Shapes: n rows of a forward, I inputs, O outputs.

Methods ask for products rather than for the weight, so that they hold over a base whose weights are quantized.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.nf4 import FrozenWeight, dense_weight
from luthier.ops.product import frozen_product


class LinearModule(Protocol):
    """A module that computes W x + b: nn.Linear, or one that holds W in NF4."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def weight(self) -> FrozenWeight: ...

    @property
    def bias(self) -> Tensor | None: ...


class BaseLinear:
    """y = W x + b of the module that it is made of, differentiable in x.

    Attributes:
        num_inputs, num_outputs: I and O.
    """

    def __init__(self, module: LinearModule) -> None:
        self.module = module
        self.num_inputs, self.num_outputs = module.in_features, module.out_features
        self._square_norms_O: Tensor | None = None

    def __call__(self, x_nI: Tensor) -> Tensor:
        """W x + b, [n, O]."""
        return self.module(x_nI)

    def product(self, x_nI: Tensor) -> Tensor:
        """W x, [n, O]."""
        weight = self.module.weight
        return F.linear(x_nI, weight) if isinstance(weight, Tensor) else frozen_product(x_nI, weight)

    @property
    def bias_O(self) -> Tensor | None:
        return self.module.bias

    @property
    def dtype(self) -> torch.dtype:
        """Of its inputs and outputs."""
        return self.module.weight.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of what is trained on it: float32 at least, whatever the base is held in."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def has_plain_weight(self) -> bool:
        """Whether the weight is there in numbers that a decomposition can be made of."""
        return isinstance(self.module.weight, Tensor) and self.module.weight.is_floating_point()

    @property
    def weight_OI(self) -> Tensor:
        """In the layer's dtype; a weight in NF4 is dequantized anew."""
        return dense_weight(self.module.weight, self.dtype).detach()

    def square_norms_O(self) -> Tensor:
        """|W_o|^2 of every row o, in float32 at least; computed once, for the base never changes."""
        if self._square_norms_O is None:
            with torch.inference_mode(False), torch.no_grad():
                self._square_norms_O = torch.linalg.vector_norm(self.weight_OI, dim=1, dtype=self.wide_dtype).square()
        return self._square_norms_O
