"""LoRA in the bank: the factors of one slot on one linear layer.

Shapes: n rows of the slot, I inputs, O outputs, R rank.

    y = W x + b + c B A x,              c = alpha / r    (or alpha / sqrt(r) with rank stabilization)
    y = W x + b + c B A x - c B0 A0 x   from PiSSA's or OLoRA's start, with A0, B0 what A, B started from, frozen

Hu et al. 2021, arXiv:2106.09685; rank-stabilized scaling: Kalajdzievski 2023, arXiv:2312.03732; starts: `start.py`. By
default A starts as Kaiming-uniform and B as zero. Either way a fresh slot leaves the base as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.lora.start import principal_factors
from luthier.methods.method import Terms, check_fits
from luthier.ops.base_linear import BaseLinear
from luthier.types import AdapterSpec

A, B = "lora_A.weight", "lora_B.weight"
"""What PEFT's files call the factors."""


@dataclass(slots=True)
class LoraFactors:
    """The two trainable factors, float32 at least, and how they act.

    Attributes:
        a_RI: Parameter [rank, inputs].
        b_OR: Parameter [outputs, rank].
        scale: Factor c of the update.
        dropout: Probability of dropping an input feature while training.
        lora_plus_ratio: Learning rate of B as a multiple of A's.
        start: A0 [rank, inputs] and B0 [outputs, rank], frozen, whose product is taken out of the base; or None.
    """

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scale: float
    dropout: float
    lora_plus_ratio: float = 1.0
    start: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {A: self.a_RI, B: self.b_OR}

    def rate_ratios(self) -> dict[str, float]:
        return {B: self.lora_plus_ratio} if self.lora_plus_ratio != 1.0 else {}

    def constants(self) -> tuple[Tensor, ...]:
        return self.start or ()

    def output(self, base: BaseLinear, x_nI: Tensor, dropped_nI: Tensor) -> Tensor:
        update_nO = self.update(dropped_nI)
        if self.start is not None:
            a0_RI, b0_OR = self.start
            update_nO = update_nO - self.scale * F.linear(F.linear(x_nI.to(a0_RI.dtype), a0_RI), b0_OR)
        return (base(x_nI) + update_nO).to(x_nI.dtype)

    def update(self, x_nI: Tensor) -> Tensor:
        """c B A x, in the factors' dtype."""
        return self.scale * F.linear(F.linear(x_nI.to(self.a_RI.dtype), self.a_RI), self.b_OR)

    def terms(self, base: BaseLinear) -> Terms:
        trained = self.a_RI, self.b_OR, self.scale
        return Terms((trained,)) if self.start is None else Terms((trained, (*self.start, -self.scale)))

    def delta(self, dtype: torch.dtype) -> Tensor:
        """What it adds to the weight, [O, I]."""
        delta_OI = self.b_OR.detach().to(dtype) @ self.a_RI.detach().to(dtype) * self.scale
        if self.start is not None:
            a0_RI, b0_OR = (tensor.to(dtype) for tensor in self.start)
            delta_OI -= b0_OR @ a0_RI * self.scale
        return delta_OI

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight_OI.dtype, self.b_OR.dtype)
        return (weight_OI.to(wide) + self.delta(wide)).to(weight_OI.dtype), bias_O

    def tensors(self) -> dict[str, Tensor]:
        # B A - B0 A0 = [B, -B0] [A; A0]: a plain LoRA of twice the rank, which peft loads over the untouched base. It
        # also holds the start to the bit, so that a resume need not decompose the base again.
        if self.start is None:
            return {A: self.a_RI, B: self.b_OR}
        a0_RI, b0_OR = self.start
        return {A: torch.cat([self.a_RI.detach(), a0_RI]), B: torch.cat([self.b_OR.detach(), -b0_OR], dim=1)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        check_fits(self.tensors(), tensors)
        with torch.no_grad():
            self.a_RI.copy_(tensors[A][: self.rank])
            self.b_OR.copy_(tensors[B][:, : self.rank])
            if self.start is not None:
                self.start[0].copy_(tensors[A][self.rank :])
                self.start[1].copy_(-tensors[B][:, self.rank :])


class LoraMethod:
    """Makes LoRA's factors, and writes and reads them."""

    name = "lora"

    def targets(self, spec: AdapterSpec, names: Sequence[str]) -> str | tuple[str, ...]:
        return spec.targets

    def check(self, spec: AdapterSpec, name: str, num_inputs: int, num_outputs: int) -> None:
        check_rank(spec.rank, name, num_inputs, num_outputs)

    def create(
        self, spec: AdapterSpec, name: str, base: BaseLinear, generator: torch.Generator, *, fresh: bool = True
    ) -> LoraFactors:
        return create(spec, name, base, generator, fresh=fresh)

    def adopt(self, spec: AdapterSpec, name: str, base: BaseLinear, tensors: Mapping[str, Tensor]) -> LoraFactors:
        a_RI, b_OR = tensors[A], tensors[B]
        found, expected = (a_RI.shape[1], b_OR.shape[0]), (base.num_inputs, base.num_outputs)
        if found != expected:
            raise ValueError(f"{name} maps {found[0]} to {found[1]} features, not {expected[0]} to {expected[1]}")
        rank = a_RI.shape[0]
        factors = _empty(replace(spec, rank=rank, init="default"), base)
        factors.load({A: a_RI, B: b_OR})
        return factors

    def peft_config(
        self, spec: AdapterSpec, adapters: Mapping[str, Any], targets: list[str] | str, fields: dict[str, Any]
    ) -> Any:
        return peft_config(spec, adapters, targets, fields)

    def describe(self, spec: AdapterSpec) -> str:
        start = f", {spec.init} start" if spec.init != "default" else ""
        plus = f", LoRA+ ratio {spec.lora_plus_ratio:g}" if spec.lora_plus_ratio != 1.0 else ""
        return f"rank {spec.rank}{', rank-stabilized' if spec.rank_stabilized else ''}{start}{plus}"


LORA = LoraMethod()


def check_rank(rank: int, name: str, num_inputs: int, num_outputs: int) -> None:
    """Refuse a rank that the layer's matrix cannot have.

    Raises:
        RecipeError: naming the largest rank there is.
    """
    most = min(num_inputs, num_outputs)
    if not 1 <= rank <= most:
        raise RecipeError(
            f"method.rank is {rank}, and {name} is a matrix of {num_outputs} x {num_inputs}",
            f"a rank from 1 to {most}",
            "lower method.rank, or leave this layer out of method.targets" if rank > most else "set method.rank",
        )


def create(
    spec: AdapterSpec, name: str, base: BaseLinear, generator: torch.Generator, *, fresh: bool = True
) -> LoraFactors:
    """Fresh factors, or open ones; see `Method.create`. PiSSA and OLoRA decompose on the base's own device.

    Raises:
        RecipeError: for a start that needs the weight's numbers, over a quantized base.
    """
    if spec.init != "default" and not base.has_plain_weight:
        raise RecipeError(
            f"method.init is {spec.init}, which takes a part out of the base's weight, and {name} is quantized",
            "a base in float32, bfloat16 or float16",
            "set method.init: default, or take a base that is not quantized",
        )
    factors = _empty(spec, base)
    with torch.no_grad():
        if not fresh:
            return factors
        if factors.start is not None:
            a0_RI, b0_OR = principal_factors(base.weight_OI.to(base.wide_dtype), spec.init, spec.rank, factors.scale)
            for tensor in (factors.a_RI, factors.start[0]):
                tensor.copy_(a0_RI)
            for tensor in (factors.b_OR, factors.start[1]):
                tensor.copy_(b0_OR)
            return factors
        a_RI = torch.empty(spec.rank, base.num_inputs)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        factors.a_RI.copy_(a_RI)
        factors.b_OR.zero_()
    return factors


def _empty(spec: AdapterSpec, base: BaseLinear) -> LoraFactors:
    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=base.wide_dtype, device=base.device)

    shapes = (spec.rank, base.num_inputs), (base.num_outputs, spec.rank)
    start = (new(*shapes[0]), new(*shapes[1])) if spec.init != "default" else None
    return LoraFactors(
        nn.Parameter(new(*shapes[0])),
        nn.Parameter(new(*shapes[1])),
        scaling(spec),
        spec.dropout,
        spec.lora_plus_ratio,
        start,
    )


def scaling(spec: AdapterSpec) -> float:
    """The factor c of the update."""
    return spec.alpha / math.sqrt(spec.rank) if spec.rank_stabilized else spec.alpha / spec.rank


def peft_config(
    spec: AdapterSpec, adapters: Mapping[str, LoraFactors], targets: list[str] | str, fields: dict[str, Any]
) -> Any:
    """PEFT's LoraConfig of these factors; twice the rank where the start is kept beside them."""
    from peft import LoraConfig

    times = 1 if spec.init == "default" else 2
    rank = times * spec.rank
    alpha = spec.alpha * (math.sqrt(times) if spec.rank_stabilized else times)
    ranks = {name: times * factors.rank for name, factors in adapters.items()}
    scales = {name: scaling(replace(spec, rank=factors.rank)) for name, factors in adapters.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=_number(alpha),  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        use_rslora=spec.rank_stabilized,
        rank_pattern={name: found for name, found in ranks.items() if found != rank},
        alpha_pattern={
            name: _number(factors.scale * (math.sqrt(ranks[name]) if spec.rank_stabilized else ranks[name]))
            for name, factors in adapters.items()
            if factors.scale != scales[name]
        },
        **fields,
    )
    # Set afterwards, for LoraConfig makes a set of a list, whose order in the file would change from run to run.
    config.target_modules = targets
    return config


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
