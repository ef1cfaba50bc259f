"""One job's optimizer: AdamW over its own slot, with its own step count, schedule and clipping.

Nothing is shared between jobs, so weight decay and moments of a slot that is not stepped do not move by one bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from luthier.engine.adamw import MOMENTS, make_adamw
from luthier.engine.flat import FlatFactors
from luthier.types import TrainSpec


class StepHooks(Protocol):
    """What a method does around each optimizer step, and what it remembers between steps."""

    def before_step(self) -> None:
        """The whole optimizer batch's gradient is there: the method may add to it."""

    def after_step(self, step: int) -> None:
        """`step` steps are done; gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """What must be kept besides the parameters, by name."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state()` gave."""


class JobOptimizer:
    """AdamW over the parameters of one slot, by the implementation that `spec.optimizer` names.

    Args:
        parameters: The slot's parameters by name.
        spec: Learning rate, schedule, betas, decay and clipping.
        total_steps: Length of the schedule.
        rate_ratios: Learning rates as multiples of the job's, of those parameters that have another.
        hooks: What the method does around each step, or None.
        flat: Memory that some of the parameters share.

    Attributes:
        shares_state: Whether ranks hold a part of its state each, so that all of them run forwards equally often.
    """

    shares_state = False

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        spec: TrainSpec,
        total_steps: int,
        rate_ratios: Mapping[str, float] | None = None,
        hooks: StepHooks | None = None,
        flat: FlatFactors | None = None,
    ) -> None:
        self.parameters = parameters
        self.hooks = hooks
        self.flat = flat
        self.spec = spec
        self.total_steps = total_steps
        self.num_steps = 0
        self._adamw = make_adamw(parameters, spec, rate_ratios or {}, flat)

    @property
    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return learning_rate_at(self.num_steps, self.total_steps, self.spec)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a part of the optimizer batch's, to the parameters'."""
        loss.backward()  # type: ignore[no-untyped-call]

    def shard(self) -> None:
        """Share the state out over the ranks, where that is to be: before the first step."""

    def gather(self) -> None:
        """Make the parameters whole again, where they are parts: after the last step."""

    @contextmanager
    def consolidated(self) -> Iterator[Mapping[str, Tensor]]:
        """Within it `state` gives all of the state; yields values of parameters that are not whole by themselves."""
        yield {}

    def finish_gradient(self) -> Tensor:
        """Let the method add its part, once the optimizer batch is complete; the gradient's 2-norm, on the device."""
        if self.hooks is not None:
            self.hooks.before_step()
        gradients = [piece.grad for piece in self.pieces() if piece.grad is not None]
        if len(gradients) == 1:  # a reduction of its own reads a large tensor several times as fast on a GPU
            return torch.linalg.vector_norm(gradients[0])
        return nn.utils.get_total_norm(gradients)

    def step(self, norm: float | None = None) -> tuple[float, float]:
        """Clip, step and clear the gradients.

        Args:
            norm: What `finish_gradient` gave, where it has been read already together with other jobs'.

        Returns:
            The gradient's 2-norm before clipping and the learning rate used. A gradient that is not finite is not
            applied.
        """
        total = self.finish_gradient() if norm is None else torch.tensor(norm)
        rate = self.learning_rate
        value = float(total) if norm is None else norm
        if math.isfinite(value):
            if self.spec.max_grad_norm > 0 and not (norm is not None and norm < self.spec.max_grad_norm):
                nn.utils.clip_grads_with_norm_(self.pieces(), self.spec.max_grad_norm, total)
            self._adamw.step(rate)
            # These steps write past autograd's count of writes, by which what is derived of a parameter is told stale.
            torch.autograd.graph.increment_version(list(self.parameters.values()))
            self.num_steps += 1
            if self.hooks is not None:
                self.hooks.after_step(self.num_steps)
        self.zero_grad()
        return value, rate

    def zero_grad(self) -> None:
        if self.flat is None:
            self._adamw.zero_grad()
            return
        first, *others = self.pieces()
        assert first.grad is not None
        first.grad.zero_()  # kept: kernels add to it by its address
        for parameter in others:
            parameter.grad = None

    def pieces(self) -> list[nn.Parameter]:
        """The parameters, those in the flat memory as one."""
        if self.flat is None:
            return list(self.parameters.values())
        return [self.flat.values_Z, *(p for name, p in self.parameters.items() if name not in self.flat.spans)]

    @property
    def state_bytes(self) -> int:
        """What the moments will take on the parameters' device."""
        return self._adamw.state_bytes

    @property
    def gradient_bytes(self) -> int:
        """What the gradients will take there."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values() if p.requires_grad)

    def state(self) -> dict[str, Tensor]:
        """The moments of every parameter, by name; `num_steps` is kept by the checkpoint."""
        tensors = self._adamw.state()
        # A parameter that some steps gave no gradient counts fewer steps of its own, for its bias correction.
        for name, steps in self._adamw.steps_of().items():
            if steps != self.num_steps:
                tensors[f"{name}.step"] = torch.tensor(float(steps))
        return tensors

    def load_state(self, tensors: dict[str, Tensor], num_steps: int) -> None:
        """Take up where `state()` and `num_steps` left off."""
        self.num_steps = num_steps
        if num_steps == 0:
            return
        # No gradient ever reaches some, as the output rows of a classifier's tokens: they have no moments.
        known = [name for name in self.parameters if f"{name}.{MOMENTS[0]}" in tensors]
        own = torch.tensor(float(num_steps))
        self._adamw.load_state(tensors, {name: int(tensors.get(f"{name}.step", own)) for name in known})


def learning_rate_at(step: int, total_steps: int, spec: TrainSpec) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then constant, linear or cosine decay."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return spec.learning_rate
    progress = min(1.0, (step - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
    share = 1.0 - progress if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return spec.learning_rate * (spec.min_learning_rate_ratio + (1.0 - spec.min_learning_rate_ratio) * share)
