"""LoRA in the bank: the factors of one slot on one linear layer.

    y = W x + c B A x,    c = alpha / r    (or alpha / sqrt(r) with rank stabilization)

Hu et al. 2021, arXiv:2106.09685; rank-stabilized scaling: Kalajdzievski 2023, arXiv:2312.03732. A starts as
Kaiming-uniform and B as zero, so that a fresh slot leaves the base as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.types import AdapterSpec


@dataclass(slots=True)
class LoraFactors:
    """The two trainable factors, float32, and how they act.

    Attributes:
        a_RI: Parameter [rank, inputs].
        b_OR: Parameter [outputs, rank].
        scale: Factor of the update.
        dropout: Probability of dropping an input feature while training.
    """

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scale: float
    dropout: float

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters under the names that PEFT's files give them."""
        return {"lora_A.weight": self.a_RI, "lora_B.weight": self.b_OR}


def create(
    spec: AdapterSpec,
    num_inputs: int,
    num_outputs: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> LoraFactors:
    """Fresh factors. The draw happens on the CPU, so that every device starts from the same values."""
    a_RI = torch.empty(spec.rank, num_inputs)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    b_OR = torch.zeros(num_outputs, spec.rank)
    return LoraFactors(
        nn.Parameter(a_RI.to(device, dtype)), nn.Parameter(b_OR.to(device, dtype)), scaling(spec), spec.dropout
    )


def scaling(spec: AdapterSpec) -> float:
    """The factor c of the update."""
    return spec.alpha / math.sqrt(spec.rank) if spec.rank_stabilized else spec.alpha / spec.rank


def merged_weight(weight_OI: Tensor, factors: LoraFactors) -> Tensor:
    """W + c B A in the weight's dtype, computed in float32 at least."""
    wide = torch.promote_types(weight_OI.dtype, factors.b_OR.dtype)
    delta_OI = factors.b_OR.detach().to(wide) @ factors.a_RI.detach().to(wide) * factors.scale
    return (weight_OI.to(wide) + delta_OI).to(weight_OI.dtype)
