"""The one slot of an exclusive job: trained parameters of a base that the job owns.

It offers what `engine.slot.Slot` offers (parameters by stable name, load, counts), so that job, optimizer, memory plan
and checkpoints are the same code. Where the base is held in less than float32, what the optimizer steps are float32
masters: gradients are added up in them, and after each step they are rounded into the base (Micikevicius et al. 2017,
arXiv:1710.03740, without loss scaling, which bfloat16 does not need).

Shapes: C classes, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from luthier.engine.bank import Bank
from luthier.engine.optimizer import StepHooks
from luthier.engine.pack import Segment
from luthier.types import HEAD_NOUNS, ExclusiveSpec

OWN_SLOT = 0
"""Index of the one slot; sequences with `BASE_SLOT` run through the base as it was, where that is still there."""


@dataclass(slots=True)
class OwnSlot:
    """One job's trainable state in a base of its own.

    Attributes:
        spec: What was asked for.
        live: The model's own parameters that train, by their names in the model.
        trained: What the optimizer steps, by the same names: the live parameters themselves, or their float32 masters.
        head: Sequence head [C, D] without bias, token head [C, D] with one, or None.
        method_hooks: What the method itself does around a step (AdaLoRA), or None.
        has_moved: Whether the weights may differ from where the job began.
        token_rows: Always None: exclusive methods add no tokens.
        flat: Always None: what trains here lies where the model has it.
        has_masters: Whether masters are kept for narrow weights; not where somebody else keeps them (ZeRO).
        exact: Without masters, the loaded values that the model's narrower weights could not hold.
        whole: Values that a checkpoint takes instead of parameters of which this process holds a part alone.
    """

    spec: ExclusiveSpec
    live: dict[str, nn.Parameter]
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    head: nn.Module | None = None
    method_hooks: StepHooks | None = None
    has_moved: bool = False
    index: int = OWN_SLOT
    token_rows: None = None
    flat: None = None
    has_masters: bool = True
    exact: dict[str, Tensor] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.live.items():
            parameter.requires_grad_(True)
            needs_master = self.has_masters and parameter.element_size() < 4
            self.trained[name] = _with_master(parameter) if needs_master else parameter

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor under a stable name, in the model's order."""
        named = dict(self.trained)
        if self.head is not None:
            named |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return named

    def rate_ratios(self) -> dict[str, float]:
        """Every parameter has the job's learning rate."""
        return {}

    def constants(self) -> list[Tensor]:
        """Nothing is kept beside the model."""
        return []

    @property
    def num_trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters().values())

    def parts(self) -> list[str]:
        """What trains, in words."""
        of = f" of peft's {self.spec.peft_type.lower()}" if self.spec.peft_type else ""
        parts = [f"{len(self.live)} tensors{of}"]
        parts += ["float32 masters"] if any(self.trained[n] is not p for n, p in self.live.items()) else []
        head = f"a head of {self.spec.num_classes} {HEAD_NOUNS[self.spec.head]}"
        parts += [head] if self.head is not None else []
        return parts

    @property
    def hooks(self) -> StepHooks:
        return _OwnHooks(self)

    def state(self) -> dict[str, Tensor]:
        """What the method keeps besides its parameters, as tensors by name."""
        return self.method_hooks.state() if self.method_hooks is not None else {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state()` gave."""
        if self.method_hooks is not None:
            self.method_hooks.load_state(tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
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
            if parameter.element_size() < tensors[name].element_size():
                self.exact[name] = tensors[name]
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        self.has_moved = True
        for name, parameter in self.live.items():
            if self.trained[name] is not parameter:
                parameter.copy_(self.trained[name])


class _OwnHooks:
    """Around each optimizer step: what the method does, then masters into the model."""

    def __init__(self, slot: OwnSlot) -> None:
        self._slot = slot

    def before_step(self) -> None:
        if self._slot.method_hooks is not None:
            self._slot.method_hooks.before_step()

    def after_step(self, step: int) -> None:
        if self._slot.method_hooks is not None:
            self._slot.method_hooks.after_step(step)
        self._slot.publish()

    def state(self) -> dict[str, Tensor]:
        return self._slot.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._slot.load_state(tensors)


class OwnBank(Bank):
    """The bank of a base that one job owns: it wraps no layer and takes no other slot."""

    def admit_owner(self, slot: OwnSlot, seed: int) -> None:
        """Take the one slot in, with a fresh head where it is to have one."""
        if slot.spec.num_classes is not None:
            generator = torch.Generator().manual_seed(seed)
            slot.head = self._head(slot.spec.num_classes, slot.spec.head, generator)
        self.slots = {slot.index: slot}  # type: ignore[dict-item]

    def add(self, *given: Any, **named: Any) -> NoReturn:
        raise ValueError("this base belongs to an exclusive job and takes no other slot")

    def snapshot(self, *given: Any, **named: Any) -> NoReturn:
        raise ValueError("an exclusive job's weights are not copied to serve; load what it wrote")

    def group(self, names: Sequence[str]) -> None:
        """Layers are not wrapped, so none run as one."""

    def head_is_plain_for(self, segments: Iterable[Segment]) -> bool:
        """Whatever the job changes about the output layer, it changes in the model itself."""
        return True


def _with_master(live: nn.Parameter) -> nn.Parameter:
    """A float32 copy that takes over the gradient of `live` each time a backward has made it."""
    master = nn.Parameter(live.detach().float())

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    live.register_post_accumulate_grad_hook(take)
    return master
