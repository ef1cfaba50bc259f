"""A base whose linear layers are held in fp8: half of bfloat16's bytes, and products at up to twice its rate.

Every linear layer but the output layer is rounded once, at load; embeddings, norms and the output layer stay as they
are. A layer whose sizes the GPU's product does not take stays too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.ops.fp8 import Fp8Weight, fits_fp8, quantize_weight
from luthier.ops.product import frozen_product


class Fp8Linear(nn.Module):
    """y = W x + b with a frozen W in fp8.

    Attributes:
        weight: Not a parameter: nothing trains, moves or casts it.
        bias: Frozen parameter [O], or None.
    """

    def __init__(self, weight: Fp8Weight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(bias_O.detach(), requires_grad=False) if bias_O is not None else None
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        return frozen_product(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@torch.no_grad()
def hold_in_fp8(model: nn.Module) -> None:
    """Replace a causal language model's linear layers but the output layer, one after another."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not plain or module is head or not fits_fp8(module.weight):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Fp8Linear(quantize_weight(module.weight), module.bias))


def fp8_weights(model: nn.Module) -> dict[str, Fp8Weight]:
    """The weights in fp8 by their layer's name; the bank has not wrapped the model yet."""
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
