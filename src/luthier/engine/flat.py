"""A slot's factors in one piece of memory, and their gradients in another.

Shapes: Z numbers of all factors together.

One tensor a slot instead of hundreds: the optimizer steps, clips and clears it in a few launches. The factors stay
parameters of their own under their own names; they become views.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Every factor starts at a multiple of this many numbers, for loads of whole lines."""


class FlatFactors:
    """Moves `parameters` into one tensor.

    Attributes:
        values_Z: Parameter; its `.grad` is where every factor's gradient adds up.
        spans: Name -> where the parameter lies in it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        first = next(iter(parameters.values()))
        self.spans: dict[str, tuple[int, int]] = {}
        size = 0
        for name, parameter in parameters.items():
            self.spans[name] = (size, size + parameter.numel())
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.values_Z = nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device))
        self.values_Z.grad = torch.zeros_like(self.values_Z)
        self._rounded_Z: Tensor | None = None
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            value = self.view(self.values_Z.detach(), name)
            value.copy_(parameter.detach())
            parameter.data = value
            parameter.grad = self.view(self.grad_Z, name)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The values in another dtype, as they are now, in memory that stays the same from call to call."""
        if self._rounded_Z is None:
            with torch.inference_mode(False):  # a slot that is sampled from may train afterwards
                self._rounded_Z = torch.empty_like(self.values_Z, dtype=dtype, requires_grad=False)
        return self._rounded_Z.copy_(self.values_Z.detach())

    @property
    def grad_Z(self) -> Tensor:
        assert self.values_Z.grad is not None
        return self.values_Z.grad

    def view(self, flat_Z: Tensor, name: str) -> Tensor:
        """The part of a tensor laid out as `values_Z` that belongs to the parameter `name`."""
        start, end = self.spans[name]
        return flat_Z[start:end].view(self._shapes[name])
