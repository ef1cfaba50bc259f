"""One job's optimizer: AdamW over its own slot, with its own step count, schedule and clipping.

Nothing is shared between jobs, so weight decay and moments of a slot that is not stepped do not move by one bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

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
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over the parameters of one slot.

    Args:
        parameters: The slot's parameters by name.
        spec: Learning rate, schedule, betas, decay and clipping.
        total_steps: Length of the schedule.
        rate_ratios: Learning rates as multiples of the job's, of those parameters that have another.
        hooks: What the method does around each step, or None.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        spec: TrainSpec,
        total_steps: int,
        rate_ratios: Mapping[str, float] | None = None,
        hooks: StepHooks | None = None,
    ) -> None:
        self.parameters = parameters
        self.hooks = hooks
        self.spec = spec
        self.total_steps = total_steps
        self.num_steps = 0
        by_ratio: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            by_ratio.setdefault((rate_ratios or {}).get(name, 1.0), []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [{"params": members, "rate_ratio": ratio} for ratio, members in by_ratio.items()],
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=True,
        )

    @property
    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return learning_rate_at(self.num_steps, self.total_steps, self.spec)

    def step(self) -> tuple[float, float]:
        """Clip, step and clear the gradients.

        Returns:
            The gradient's 2-norm before clipping and the learning rate used. A gradient that is not finite is not
            applied.
        """
        if self.hooks is not None:
            self.hooks.before_step()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        rate = self.learning_rate
        value = float(norm)
        if math.isfinite(value):
            if self.spec.max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.spec.max_grad_norm, norm)
            for group in self._adamw.param_groups:
                group["lr"] = rate * group["rate_ratio"]
            self._adamw.step()
            # Fused steps write past autograd's count of writes, by which what is derived of a parameter is told stale.
            torch.autograd.graph.increment_version(list(self.parameters.values()))
            self.num_steps += 1
            if self.hooks is not None:
                self.hooks.after_step(self.num_steps)
        self.zero_grad()
        return value, rate

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Both moments of every parameter, by name; `num_steps` is kept by the checkpoint."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self._adamw.state:
                    tensors[f"{name}.{moment}"] = self._adamw.state[parameter][moment]
            # A parameter that some steps gave no gradient counts fewer steps of its own, for its bias correction.
            if parameter in self._adamw.state and int(self._adamw.state[parameter]["step"]) != self.num_steps:
                tensors[f"{name}.step"] = self._adamw.state[parameter]["step"]
        return tensors

    def load_state(self, tensors: dict[str, Tensor], num_steps: int) -> None:
        """Take up where `state()` and `num_steps` left off."""
        self.num_steps = num_steps
        if num_steps == 0:
            return
        for name, parameter in self.parameters.items():
            if f"{name}.exp_avg" not in tensors:
                continue  # no gradient ever reaches it, as the output rows of a classifier's tokens
            self._adamw.state[parameter] = {
                "step": tensors.get(f"{name}.step", torch.tensor(float(num_steps))).to(parameter.device).clone(),
                "exp_avg": tensors[f"{name}.exp_avg"].to(parameter.device, parameter.dtype).clone(),
                "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(parameter.device, parameter.dtype).clone(),
            }


def learning_rate_at(step: int, total_steps: int, spec: TrainSpec) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then constant, linear or cosine decay."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return spec.learning_rate
    progress = min(1.0, (step - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
    share = 1.0 - progress if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return spec.learning_rate * (spec.min_learning_rate_ratio + (1.0 - spec.min_learning_rate_ratio) * share)
