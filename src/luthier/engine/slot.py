"""A slot of the bank: all that one job changes about the base.

Shapes: D hidden size, V base vocabulary, K trained tokens, C classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from luthier.methods.lora.layer import LoraFactors
from luthier.types import AdapterSpec


@dataclass(slots=True)
class TokenRows:
    """Embedding rows of chosen tokens, trained by one slot. Ids past the base's vocabulary are new tokens.

    Attributes:
        ids_K: int64, ascending.
        input_KD: Parameter. Replaces these tokens' input embeddings.
        output_KD: Parameter. Replaces their rows of the output layer; the same object where the base ties the two.
    """

    ids_K: Tensor
    input_KD: nn.Parameter
    output_KD: nn.Parameter

    @property
    def is_tied(self) -> bool:
        return self.input_KD is self.output_KD


@dataclass(slots=True)
class Slot:
    """One job's trainable state on the base. Nothing here is shared with another slot.

    Attributes:
        index: Its number in the bank, never reused in a process.
        spec: What was asked for.
        adapters: Linear layer's name -> its factors.
        saved_modules: Module's name -> this slot's own trained copy.
        token_rows: Trained embedding rows, or None.
        head: Sequence head [C, D] without bias, or None.
        is_snapshot: True for an immutable copy that serves.
    """

    index: int
    spec: AdapterSpec
    adapters: dict[str, LoraFactors] = field(default_factory=dict)
    saved_modules: dict[str, nn.Module] = field(default_factory=dict)
    token_rows: TokenRows | None = None
    head: nn.Linear | None = None
    is_snapshot: bool = False

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable tensor under a stable name, in a stable order."""
        named: dict[str, nn.Parameter] = {}
        for module, factors in self.adapters.items():
            named |= {f"{module}.{name}": parameter for name, parameter in factors.named_parameters().items()}
        for module, copied in self.saved_modules.items():
            named |= {f"{module}.{name}": parameter for name, parameter in copied.named_parameters()}
        if self.token_rows is not None:
            named["token_rows.input"] = self.token_rows.input_KD
            if not self.token_rows.is_tied:
                named["token_rows.output"] = self.token_rows.output_KD
        if self.head is not None:
            named |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return named

    @property
    def num_trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters().values() if parameter.requires_grad)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy values in by name.

        Raises:
            KeyError: naming what is missing or unexpected.
            ValueError: naming a tensor of another shape.
        """
        own = self.parameters()
        odd = sorted(set(own) ^ set(tensors))
        if odd:
            raise KeyError(f"tensors that only one side has: {', '.join(odd[:5])}" + (" ..." if len(odd) > 5 else ""))
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])

    def snapshot(self, index: int) -> Slot:
        """An immutable copy that can serve while this slot goes on training."""
        memo: dict[int, object] = {id(self.spec): self.spec}
        twin = copy.deepcopy(self, memo)
        twin.index, twin.is_snapshot = index, True
        for parameter in twin.parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None
        return twin
