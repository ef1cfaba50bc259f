"""(IA)^3 in the bank: the vector of one slot on one linear layer.

Shapes: n rows of the slot, I inputs, O outputs.

    y = l * (W x + b),    l [O, 1]    keys and values
    y = W (l * x) + b,    l [1, I]    the feed-forward's down projection

Liu et al. 2022, arXiv:2205.05638, section 3.3. l starts at one, so that a fresh slot leaves the base as it is. The
shapes are those of PEFT's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.methods.ia3.targets import default_feedforward, default_targets
from luthier.methods.method import Terms, copy_in
from luthier.ops.base_linear import BaseLinear
from luthier.types import AdapterSpec

VECTOR = "ia3_l"
"""What PEFT's files call l."""


@dataclass(slots=True)
class Ia3Vector:
    """The factors l.

    Attributes:
        vector: Parameter [1, inputs] of a feed-forward layer, [outputs, 1] of any other.
        is_feedforward: Whether it scales the input.
    """

    vector: nn.Parameter
    is_feedforward: bool

    @property
    def dropout(self) -> float:
        return 0.0

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {VECTOR: self.vector}

    def rate_ratios(self) -> dict[str, float]:
        return {}

    def constants(self) -> tuple[Tensor, ...]:
        return ()

    def output(self, base: BaseLinear, x_nI: Tensor, dropped_nI: Tensor) -> Tensor:
        l = self.vector.flatten()  # noqa: E741 (the paper's name)
        if self.is_feedforward:
            return base((l * x_nI).to(x_nI.dtype))
        return (l * base(x_nI)).to(x_nI.dtype)

    def terms(self, base: BaseLinear) -> Terms:
        if self.is_feedforward:
            return Terms(input_gain_I=self.vector.flatten())
        return Terms(gain_O=self.vector.flatten(), gain_spans_bias=True)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(weight_OI.dtype, self.vector.dtype)
        vector = self.vector.detach().to(wide)
        merged_OI = (weight_OI.to(wide) * vector).to(weight_OI.dtype)
        if self.is_feedforward or bias_O is None:
            return merged_OI, bias_O
        return merged_OI, (bias_O.to(wide) * vector.flatten()).to(bias_O.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {VECTOR: self.vector}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        copy_in(self.tensors(), tensors)


class Ia3Method:
    """Makes (IA)^3's vectors, and writes and reads them."""

    name = "ia3"

    def targets(self, spec: AdapterSpec, names: Sequence[str]) -> str | tuple[str, ...]:
        return default_targets(names) if spec.targets == "default" else spec.targets

    def check(self, spec: AdapterSpec, name: str, num_inputs: int, num_outputs: int) -> None:
        """Any linear layer can be scaled."""

    def create(
        self, spec: AdapterSpec, name: str, base: BaseLinear, generator: torch.Generator, *, fresh: bool = True
    ) -> Ia3Vector:
        if spec.feedforward is None:
            is_feedforward = bool(default_feedforward([name]))
        else:
            is_feedforward = any(name == end or name.endswith("." + end) for end in spec.feedforward)
        shape = (1, base.num_inputs) if is_feedforward else (base.num_outputs, 1)
        return Ia3Vector(nn.Parameter(torch.ones(shape, dtype=base.wide_dtype, device=base.device)), is_feedforward)

    def adopt(self, spec: AdapterSpec, name: str, base: BaseLinear, tensors: Mapping[str, Tensor]) -> Ia3Vector:
        vector = tensors[VECTOR]
        shapes: dict[tuple[int, ...], bool] = {(1, base.num_inputs): True, (base.num_outputs, 1): False}
        if tuple(vector.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has a vector of shape {tuple(vector.shape)}, not {expected}")
        is_feedforward = shapes[tuple(vector.shape)]
        return Ia3Vector(nn.Parameter(vector.to(base.device, base.wide_dtype, copy=True)), is_feedforward)

    def peft_config(
        self, spec: AdapterSpec, adapters: Mapping[str, Any], targets: list[str] | str, fields: dict[str, Any]
    ) -> Any:
        from peft import IA3Config

        inner = [name for name, adapter in adapters.items() if adapter.is_feedforward]
        outer = [name for name, adapter in adapters.items() if not adapter.is_feedforward]
        ends = sorted({name.rsplit(".", 1)[-1] for name in inner})
        # PEFT takes a layer for a feed-forward one by the end of its name, in the middle of a word too, and wants the
        # feed-forward names among the targets.
        if isinstance(targets, str) or not set(ends) <= set(targets) or any(n.endswith(tuple(ends)) for n in outer):
            targets, ends = sorted(adapters), sorted(inner)
        config = IA3Config(**fields)
        config.target_modules, config.feedforward_modules = targets, ends
        return config

    def describe(self, spec: AdapterSpec) -> str:
        return ""


IA3 = Ia3Method()
