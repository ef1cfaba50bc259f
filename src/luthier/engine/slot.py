"""A slot of the bank: all that one job changes about the base.

Shapes: D hidden size, V base vocabulary, K trained tokens, C classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn

from luthier.engine.flat import FlatFactors
from luthier.engine.optimizer import StepHooks
from luthier.methods.method import LayerAdapter, check_fits, copy_in
from luthier.methods.registry import METHODS
from luthier.types import HEAD_NOUNS, AdapterSpec


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
        adapters: Linear layer's name -> what its method keeps for it.
        saved_modules: Module's name -> this slot's own trained copy.
        token_rows: Trained embedding rows, or None.
        head: On a causal base a sequence head [C, D] without bias or a token head [C, D] with one; on an encoder what
            `base.encoder.Encoder.fresh_head` makes; or None.
        is_snapshot: True for an immutable copy that serves.
        flat: The adapters' memory in one piece, on bases that train by their fast body.
    """

    index: int
    spec: AdapterSpec
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    saved_modules: dict[str, nn.Module] = field(default_factory=dict)
    token_rows: TokenRows | None = None
    head: nn.Module | None = None
    is_snapshot: bool = False
    flat: FlatFactors | None = None

    def gather(self) -> None:
        """Move the adapters' parameters into one piece of memory, so that they are stepped in one."""
        named = {
            f"{module}.{name}": parameter
            for module, factors in self.adapters.items()
            for name, parameter in factors.named_parameters().items()
        }
        self.flat = FlatFactors(named) if named else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable tensor under a stable name, in a stable order."""
        named: dict[str, nn.Parameter] = {}
        for module, adapter in self.adapters.items():
            named |= {f"{module}.{name}": parameter for name, parameter in adapter.named_parameters().items()}
        return named | self._own_parameters()

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """What it trains besides its adapters."""
        named: dict[str, nn.Parameter] = {}
        for module, copied in self.saved_modules.items():
            named |= {f"{module}.{name}": parameter for name, parameter in copied.named_parameters()}
        if self.token_rows is not None:
            named["token_rows.input"] = self.token_rows.input_KD
            if not self.token_rows.is_tied:
                named["token_rows.output"] = self.token_rows.output_KD
        if self.head is not None:
            named |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return named

    def rate_ratios(self) -> dict[str, float]:
        """Learning rates as multiples of the job's, of those parameters that have another."""
        return {
            f"{module}.{name}": ratio
            for module, adapter in self.adapters.items()
            for name, ratio in adapter.rate_ratios().items()
        }

    def constants(self) -> list[Tensor]:
        """Tensors that it keeps and never trains."""
        return [tensor for adapter in self.adapters.values() for tensor in adapter.constants()]

    @property
    def hooks(self) -> StepHooks | None:
        """What the method does around an optimizer step: nothing, for those of the bank."""
        return None

    @property
    def num_trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters().values() if parameter.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """All that it has learnt, by name: the parameters, where the adapters keep them as PEFT's files do."""
        named: dict[str, Tensor] = {}
        for module, adapter in self.adapters.items():
            named |= {f"{module}.{name}": tensor for name, tensor in adapter.tensors().items()}
        return named | self._own_parameters()

    def parts(self) -> list[str]:
        """What trains, in words."""
        size = METHODS[self.spec.method].describe(self.spec)
        parts = [f"{len(self.adapters)} linear layers" + (f", {size}" if size else "")] if self.adapters else []
        parts += [f"{name} in full" for name in self.saved_modules]
        parts += [f"{len(self.token_rows.ids_K)} tokens"] if self.token_rows is not None else []
        head = f"a head of {self.spec.num_classes} {HEAD_NOUNS[self.spec.head]}"
        parts += [head] if self.head is not None else []
        return parts

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take in what `tensors` gave.

        Raises:
            KeyError: naming what is missing or unexpected.
            ValueError: naming a tensor of another shape.
        """
        check_fits(self.tensors(), tensors)
        for module, adapter in self.adapters.items():
            adapter.load({name: tensors[f"{module}.{name}"] for name in adapter.tensors()})
        own = self._own_parameters()
        copy_in(own, {name: tensors[name] for name in own})

    def snapshot(self, index: int) -> Slot:
        """An immutable copy that can serve while this slot goes on training."""
        memo: dict[int, object] = {id(self.spec): self.spec, id(self.flat): None}
        twin = copy.deepcopy(self, memo)
        twin.index, twin.is_snapshot = index, True
        for parameter in twin.parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None
        return twin
