"""DoRA in the bank: the factors and magnitudes of one slot on one linear layer.

Shapes: n rows of the slot, I inputs, O outputs, R rank.

    y = g * (W x + c B A x) + b,                          g = m / |W + c B A|_row, the norm detached
    y = W x + b + (g - 1) * W x' + g * c B A x'           with dropout, x' = dropout(x), as PEFT defines it

The norm never needs the weight itself, so it holds over a quantized base:

    |W + c B A|^2 = |W|^2 + 2 c rowsum(B * (W A^T)) + c^2 diag(B A A^T B^T),

where W A^T comes from A's rows run through the base's product. It changes only when A or B do, so it is computed once
an optimizer step. Liu et al. 2024, arXiv:2402.09353, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.methods.lora import layer as lora
from luthier.methods.lora.layer import LoraFactors
from luthier.methods.method import Terms, copy_in
from luthier.ops.base_linear import BaseLinear
from luthier.types import AdapterSpec

MAGNITUDE = "lora_magnitude_vector"
"""What PEFT's files call m."""


@dataclass(slots=True)
class DoraFactors:
    """LoRA's factors, and the length of each row of the adapted weight.

    Attributes:
        low: A, B and how they act.
        magnitude_O: Parameter [outputs].
    """

    low: LoraFactors
    magnitude_O: nn.Parameter
    _norm: _Norm | None = field(default=None, repr=False, compare=False)

    @property
    def dropout(self) -> float:
        return self.low.dropout

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {**self.low.named_parameters(), MAGNITUDE: self.magnitude_O}

    def rate_ratios(self) -> dict[str, float]:
        return self.low.rate_ratios()

    def constants(self) -> tuple[Tensor, ...]:
        return () if self._norm is None else (self._norm.norm_O,)

    def output(self, base: BaseLinear, x_nI: Tensor, dropped_nI: Tensor) -> Tensor:
        gain_O = self.gain(base)
        update_nO = gain_O * self.low.update(dropped_nI)
        if dropped_nI is x_nI:
            out_nO = gain_O * base.product(x_nI) + update_nO
            out_nO = out_nO if base.bias_O is None else out_nO + base.bias_O
        else:
            out_nO = base(x_nI) + (gain_O - 1) * base.product(dropped_nI.to(x_nI.dtype)) + update_nO
        return out_nO.to(x_nI.dtype)

    def gain(self, base: BaseLinear) -> Tensor:
        """g [O], differentiable in m alone."""
        return self.magnitude_O / self.norm(base)

    def norm(self, base: BaseLinear) -> Tensor:
        """|W + c B A| of every row, [O], detached; computed again only when A or B have changed."""
        a_RI, b_OR = self.low.a_RI, self.low.b_OR
        # A tensor counts the writes into it, so that no step (`JobOptimizer` sees to it), load or edit is missed.
        seen = id(a_RI), a_RI._version, id(b_OR), b_OR._version
        if self._norm is None or self._norm.seen != seen:
            self._norm = _Norm(seen, weight_norm(base, self.low))
        return self._norm.norm_O

    def terms(self, base: BaseLinear) -> Terms:
        return Terms(self.low.terms(base).low_rank, gain_O=self.gain(base))

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight_OI.dtype, self.magnitude_O.dtype)
        merged_OI = weight_OI.to(wide) + self.low.delta(wide)
        gain_O = self.magnitude_O.detach().to(wide) / merged_OI.norm(dim=1)
        return (gain_O[:, None] * merged_OI).to(weight_OI.dtype), bias_O

    def tensors(self) -> dict[str, Tensor]:
        return {**self.low.tensors(), MAGNITUDE: self.magnitude_O}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        copy_in(self.tensors(), tensors)


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm, and the state of the factors that it was computed from."""

    seen: tuple[int, int, int, int]
    norm_O: Tensor


def weight_norm(base: BaseLinear, low: LoraFactors) -> Tensor:
    """|W + c B A| of every row, [O], without W."""
    # A step's first forward may be one that samples: what it caches must be fit for training too.
    with torch.inference_mode(False), torch.no_grad():
        a_RI, b_OR, c = low.a_RI.detach(), low.b_OR.detach(), low.scale
        wa_RO = base.product(a_RI.to(base.dtype)).to(a_RI.dtype)
        cross_O = (b_OR * wa_RO.t()).sum(dim=1)
        own_O = ((b_OR @ (a_RI @ a_RI.t())) * b_OR).sum(dim=1)
        square_O = base.square_norms_O() + 2 * c * cross_O + c * c * own_O
        # Rounding may take the square of a row that nearly vanishes below zero.
        return square_O.clamp_min(torch.finfo(square_O.dtype).tiny).sqrt()


class DoraMethod:
    """Makes DoRA's factors and magnitudes, and writes and reads them."""

    name = "dora"

    def targets(self, spec: AdapterSpec, names: Sequence[str]) -> str | tuple[str, ...]:
        return spec.targets

    def check(self, spec: AdapterSpec, name: str, num_inputs: int, num_outputs: int) -> None:
        lora.check_rank(spec.rank, name, num_inputs, num_outputs)

    def create(
        self, spec: AdapterSpec, name: str, base: BaseLinear, generator: torch.Generator, *, fresh: bool = True
    ) -> DoraFactors:
        low = lora.create(spec, name, base, generator, fresh=fresh)
        # B starts at zero, so that the length of the adapted row is the base's.
        length_O = base.square_norms_O().sqrt() if fresh else torch.empty(base.num_outputs, device=base.device)
        return DoraFactors(low, nn.Parameter(length_O.to(base.wide_dtype)))

    def adopt(self, spec: AdapterSpec, name: str, base: BaseLinear, tensors: Mapping[str, Tensor]) -> DoraFactors:
        low = lora.LORA.adopt(spec, name, base, tensors)
        length_O = tensors[MAGNITUDE]
        if length_O.shape != (base.num_outputs,):
            raise ValueError(f"{name} has magnitudes of shape {tuple(length_O.shape)}, not {(base.num_outputs,)}")
        return DoraFactors(low, nn.Parameter(length_O.to(base.device, base.wide_dtype, copy=True)))

    def peft_config(
        self, spec: AdapterSpec, adapters: Mapping[str, Any], targets: list[str] | str, fields: dict[str, Any]
    ) -> Any:
        lows = {name: adapter.low for name, adapter in adapters.items()}
        return lora.peft_config(spec, lows, targets, {**fields, "use_dora": True})

    def describe(self, spec: AdapterSpec) -> str:
        return lora.LORA.describe(spec)


DORA = DoraMethod()
