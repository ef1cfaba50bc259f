"""What a method of the bank is: the verbs by which bank, optimizer, checkpoint and merge reach it.

Shapes: n rows of one slot in a forward, I inputs, O outputs, R rank.

A method has a folder of its own: `__init__.py` introduces it, `config.py` has its fields in a recipe, `layer.py` its
`Method` and the `LayerAdapter` that a slot holds a layer, `files.py` how its adapters look in PEFT's files. It
registers with a line each in `methods/config.py`, `methods/registry.py` and `methods/formats.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier.ops.base_linear import BaseLinear
from luthier.types import AdapterSpec


@dataclass(frozen=True, slots=True)
class Terms:
    """What an adapter does to its rows, in the form that fused code takes:

        y = gain * (W (input_gain * x) + sum of c B A x) + b      (or gain * (... + b), if `gain_spans_bias`)

    Attributes:
        low_rank: (A [R, I], B [O, R], c) of each low-rank part; a part may be frozen.
        gain_O, input_gain_I: Factors of outputs and inputs, or None for 1.
        gain_spans_bias: Whether the gain multiplies the bias too.
    """

    low_rank: tuple[tuple[Tensor, Tensor, float], ...] = ()
    gain_O: Tensor | None = None
    gain_spans_bias: bool = False
    input_gain_I: Tensor | None = None

    @property
    def is_additive(self) -> bool:
        """Whether it only adds to what the layer gives."""
        return self.gain_O is None and self.input_gain_I is None


class LayerAdapter(Protocol):
    """What one slot keeps for one linear layer, and how it acts there."""

    @property
    def dropout(self) -> float:
        """Probability of dropping an input feature of the trained branch while training."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, under stable names."""

    def rate_ratios(self) -> dict[str, float]:
        """Learning rates as multiples of the job's, of those parameters that have another."""

    def constants(self) -> tuple[Tensor, ...]:
        """Tensors that it keeps and never trains."""

    def output(self, base: BaseLinear, x_nI: Tensor, dropped_nI: Tensor) -> Tensor:
        """The layer's output [n, O] for its rows, in x's dtype: the definition, by plain differentiable operations.

        Args:
            dropped_nI: x with dropout applied; x itself where there is none.
        """

    def terms(self, base: BaseLinear) -> Terms:
        """The same without dropout, for the fused path."""

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that compute the same, in the weight's dtype, computed in float32 at least."""

    def tensors(self) -> dict[str, Tensor]:
        """All that it keeps, as PEFT's files name it within the layer."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what `tensors` gave.

        Raises:
            KeyError: naming what is missing or unexpected.
            ValueError: naming a tensor of another shape.
        """


class Method(Protocol):
    """A method as a whole."""

    @property
    def name(self) -> str: ...

    def targets(self, spec: AdapterSpec, names: Sequence[str]) -> str | tuple[str, ...]:
        """The layers to adapt, "all-linear" or suffixes, where `spec.targets` may leave it to the method.

        Args:
            names: Of all linear layers of the base.
        """

    def check(self, spec: AdapterSpec, name: str, num_inputs: int, num_outputs: int) -> None:
        """Refuse a layer that cannot be adapted so. Needs no weights.

        Raises:
            RecipeError: naming the field.
        """

    def create(
        self, spec: AdapterSpec, name: str, base: BaseLinear, generator: torch.Generator, *, fresh: bool = True
    ) -> LayerAdapter:
        """A fresh adapter of one layer. The draw happens on the CPU, so that every device starts from the same values.

        Args:
            name: The layer's.
            fresh: False leaves the values open, for they are loaded next.
        """

    def adopt(self, spec: AdapterSpec, name: str, base: BaseLinear, tensors: Mapping[str, Tensor]) -> LayerAdapter:
        """An adapter of what PEFT's files hold for the layer.

        Args:
            spec: With the layer's own rank and alpha.

        Raises:
            ValueError: saying what does not fit the layer.
        """

    def peft_config(
        self, spec: AdapterSpec, adapters: Mapping[str, LayerAdapter], targets: list[str] | str, fields: dict[str, Any]
    ) -> Any:
        """PEFT's own config.

        Args:
            targets: What its `target_modules` shall say.
            fields: Of any method: task type, base, modules trained in full; trained tokens where there are any.
        """

    def describe(self, spec: AdapterSpec) -> str:
        """Its size in a few words, such as "rank 16"; may be empty."""


def check_fits(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Both must have the same names and shapes.

    Raises:
        KeyError, ValueError: as `LayerAdapter.load`.
    """
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        raise KeyError(f"tensors that only one side has: {', '.join(odd[:5])}" + (" ..." if len(odd) > 5 else ""))
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}")


@torch.no_grad()
def copy_in(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy values in by name, once they fit.

    Raises:
        KeyError, ValueError: as `LayerAdapter.load`.
    """
    check_fits(own, tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
