"""A base whose linear layers are held in fp8: half of bfloat16's bytes, and products at up to twice its rate.

Every linear layer but the output layer is rounded once, at load; embeddings, norms and the output layer stay as they
are. A layer whose sizes the GPU's product does not take stays too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.ops.fp8 import Fp8Weight, fits_fp8, quantize_weight
from luthier.ops.nf4 import FrozenWeight
from luthier.ops.product import frozen_product


class Fp8Linear(nn.Module):
    """y = W x + b with a frozen W in fp8, once `settle` has been called; until then in the weight's own type.

    Attributes:
        weight: Afterwards not a parameter: nothing trains, moves or casts it.
        bias: Frozen parameter [O], or None.
    """

    weight: FrozenWeight

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features, self.in_features = linear.out_features, linear.in_features

    @torch.no_grad()
    def settle(self) -> Fp8Weight:
        """Round the weight."""
        if isinstance(self.weight, Tensor):
            held = quantize_weight(self.weight)
            del self.weight
            self.weight = held
        assert isinstance(self.weight, Fp8Weight)
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        return frozen_product(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def prepare_fp8(model: nn.Module) -> None:
    """Put layers that can be rounded in the place of a causal language model's linear layers.

    They are rounded by `settle_fp8`, after the base's structure has been probed: rounded products tell small
    differences apart too badly for a probe.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not plain or module is head or not fits_fp8(module.weight):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Fp8Linear(module))


def settle_fp8(model: nn.Module) -> dict[str, Fp8Weight]:
    """Round the layers that `prepare_fp8` has made, one after another; their weights by name."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    return {name.replace(".base", ""): module.settle() for name, module in modules.items()}
