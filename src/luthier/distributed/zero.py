"""ZeRO: model states shared out over the ranks by DeepSpeed, behind the face of a job's optimizer.

DeepSpeed owns parameters, the reduction of gradients, clipping and the step; batches, forward, loss, schedule,
checkpoints and reports stay Luthier's. Rajbhandari et al. 2020, arXiv:1910.02054: stage 1 shares out the optimizer's
state, 2 gradients too, 3 weights too.

Gradients are summed, not averaged, for a job's loss is over the whole optimizer batch already.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.base.load import Base, at_once
from luthier.engine.adamw import MOMENTS
from luthier.engine.optimizer import JobOptimizer
from luthier.engine.ranks import Ranks
from luthier.engine.zero_states import ModelStates, model_states
from luthier.errors import RecipeError
from luthier.types import TrainSpec

WEIGHTS_STAGE = 3
"""The stage from which a rank holds a part of the weights alone."""


class ZeroOptimizer(JobOptimizer):
    """AdamW whose state, and by stage gradients and weights, the ranks hold a part of each.

    Until `shard` and after `gather` the parameters are whole on every rank, and nothing is stepped.

    Args:
        parameters, spec, total_steps, rate_ratios: As `JobOptimizer`.
        base: Where the parameters act.
        ranks: All of which call every method that is marked so alike.
        config: DeepSpeed's, as `zero_config.zero_config` makes it.
        exact: Values that a checkpoint gave and narrower parameters could not hold; taken out as they are used.
    """

    shares_state = True

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        spec: TrainSpec,
        total_steps: int,
        rate_ratios: Mapping[str, float],
        base: Base,
        ranks: Ranks,
        config: Mapping[str, Any],
        exact: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(parameters, spec, total_steps, rate_ratios)
        self._base, self._ranks, self._config = base, ranks, dict(config)
        self._exact = exact if exact is not None else {}
        self._rate_ratios = dict(rate_ratios)
        self._engine: Any = None
        self._pending: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}

    @property
    def stage(self) -> int:
        return int(self._config["zero_optimization"]["stage"])

    @property
    def is_sharded(self) -> bool:
        return self._engine is not None

    @property
    def partitions(self) -> Any:
        """DeepSpeed's optimizer, which has this rank's parts; None while everything is whole."""
        return self._engine.optimizer if self._engine is not None else None

    def stepped_parts(self) -> list[Tensor]:
        """This rank's parts of the values that are stepped, flat, a tensor a group."""
        inner = self._engine.optimizer
        if self.stage == WEIGHTS_STAGE:
            return list(inner.fp32_partitioned_groups_flat)
        return list(inner.single_partition_of_fp32_groups)

    # -- sharing out, and gathering again: all ranks alike

    def shard(self) -> None:
        """Share the states out. What `load_state` took waits until now, so that no rank ever holds all of it."""
        deepspeed = import_deepspeed(self._base.device)
        module = _Trained(self.parameters, self._base.model if self.stage == WEIGHTS_STAGE else None)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self._rate_ratios.get(name, 1.0), []).append(parameter)
        inner = torch.optim.AdamW(
            [{"params": group, "rate_ratio": ratio} for ratio, group in groups.items()],
            lr=self.spec.learning_rate,
            betas=self.spec.betas,
            eps=self.spec.eps,
            weight_decay=self.spec.weight_decay,
            fused=True,
        )
        with _quiet():
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=inner, config=self._config)
        if self.stage == WEIGHTS_STAGE:
            self._base.is_sharded = True
            self._base.enter = self._engine.module
            self._fetch_adapters()
        for name in list(self._exact):
            self._put(self.parameters[name], self._exact.pop(name), None)
        self._put_moments()

    def gather(self) -> None:
        """Make every parameter whole on every rank, and let DeepSpeed go. The optimizer's state is dropped."""
        if self._engine is None:
            return
        if self.stage == WEIGHTS_STAGE:
            _make_whole(self._engine.module.parameters(), self._engine)
            self._base.is_sharded = False
            self._base.enter = at_once
        else:
            self._engine.destroy()
        self._engine = None
        for parameter in self.parameters.values():
            parameter.grad = None
        gc.collect()

    @contextmanager
    def consolidated(self) -> Iterator[Mapping[str, Tensor]]:
        """What the optimizer steps, whole: by name on the first rank's CPU, and nothing on the others.

        Within it `state` gives the moments likewise. All ranks alike.
        """
        if self._engine is None:
            yield {}
            return
        is_first = self._ranks.rank == 0
        values: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for moment in (None, *MOMENTS):
                if moment is not None and self.num_steps == 0:
                    continue
                whole = self._read(parameter, moment)
                if not is_first:
                    continue
                if moment is None:
                    values[name] = whole.to("cpu", _wide(parameter))
                else:
                    self._whole[f"{name}.{moment}"] = whole.cpu()
        try:
            yield values
        finally:
            self._whole = {}

    # -- memory

    @property
    def gradient_bytes(self) -> int:
        return self._states.gradients

    @property
    def state_bytes(self) -> int:
        """Nothing on the device where it is offloaded; a CPU's memory is the host's."""
        is_away = "offload_optimizer" in self._config["zero_optimization"] and self._base.device.type != "cpu"
        return 0 if is_away else self._states.optimizer

    @property
    def _states(self) -> ModelStates:
        num_trained = sum(p.numel() for p in self.parameters.values())
        itemsize = max(p.element_size() for p in self.parameters.values())
        return model_states(0, num_trained, itemsize, self.stage, self._ranks.size)

    # -- a step

    def backward(self, loss: Tensor) -> None:
        """All ranks alike, as often as each other."""
        # DeepSpeed's own forward does this, and is not called: stage 3 tells by it one backward from the next.
        self._engine.optimizer.clear_backward_seen_flag()
        # It takes the mean over the ranks.
        self._engine.backward(loss * self._ranks.size, scale_wrt_gas=False)

    def finish_gradient(self) -> Tensor:
        raise ValueError("the gradient's norm is known once DeepSpeed has stepped")

    def step(self, norm: float | None = None) -> tuple[float, float]:
        """As `JobOptimizer.step`; all ranks alike."""
        rate = self.learning_rate
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["rate_ratio"]
        self._engine.step()
        found = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            return math.inf, rate
        # DeepSpeed writes past autograd's count of writes, by which what is derived of a parameter is told stale.
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        self.num_steps += 1
        return found, rate

    def zero_grad(self) -> None:
        if self._engine is not None:
            self._engine.optimizer.zero_grad()

    def pieces(self) -> list[nn.Parameter]:
        """None: gradients are DeepSpeed's to sum."""
        return []

    # -- checkpoints

    def state(self) -> dict[str, Tensor]:
        """The moments, whole, on the first rank within `consolidated`."""
        if self._engine is None:
            return dict(self._pending)
        return dict(self._whole)

    def load_state(self, tensors: dict[str, Tensor], num_steps: int) -> None:
        self.num_steps = num_steps
        self._pending = dict(tensors) if num_steps else {}

    # -- DeepSpeed's own tensors

    def _read(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """The float32 value that is stepped, or a moment of it, whole on the device. All ranks alike."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            whole: Tensor = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, moment)
        return whole

    def _put_moments(self) -> None:
        """Into this rank's parts, what a checkpoint held."""
        if self.num_steps == 0:
            return
        inner = self._engine.optimizer
        for flat in self.stepped_parts():
            step = torch.tensor(float(self.num_steps), device=flat.device)
            inner.optimizer.state[flat] = {"step": step, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        if self.stage < WEIGHTS_STAGE:
            inner._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                self._put(parameter, self._pending.pop(f"{name}.{moment}"), moment)

    def _put(self, parameter: nn.Parameter, whole: Tensor, moment: str | None) -> None:
        """Copy this rank's part of a whole value, or of a moment."""
        from deepspeed import utils

        part = whole
        if self.stage == WEIGHTS_STAGE:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = F.pad(whole.reshape(-1), (0, size * self._ranks.size - whole.numel()))
            part = padded[size * self._ranks.rank :][:size]
        kind = "local" if self.stage == WEIGHTS_STAGE else "full"
        if moment is None:
            getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, part)
        else:
            getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, part, moment)

    def _fetch_adapters(self) -> None:
        """Parameters that are no child of the model stay whole on every rank, for no forward of theirs is hooked."""
        inside = {id(parameter) for parameter in self._base.model.parameters()}
        outside = [p for p in self.parameters.values() if id(p) not in inside]
        if outside:
            outside[0].all_gather(outside)  # type: ignore[attr-defined]


class _Trained(nn.Module):
    """What DeepSpeed is given: the trained parameters, and the whole model where its weights are shared out too."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], model: nn.Module | None) -> None:
        super().__init__()
        if model is not None:
            self.model = model
        inside = {id(parameter) for parameter in self.parameters()}
        for name, parameter in parameters.items():
            if id(parameter) not in inside:
                self.register_parameter(name.replace(".", "/"), parameter)

    def forward(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run the model: DeepSpeed begins to follow which weights are needed when this module is called."""
        return run()


def _make_whole(parameters: Iterable[nn.Parameter], engine: Any) -> None:
    """Gather weights for good, and take away what DeepSpeed has put on the model."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    kept = list(parameters)
    values = []
    for parameter in kept:
        with GatheredParameters([parameter]):
            values.append(parameter.data.clone())
    engine.destroy()
    for parameter, value in zip(kept, values, strict=True):
        parameter.data = value
        for name in [name for name in vars(parameter) if name.startswith("ds_")]:
            delattr(parameter, name)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def import_deepspeed(device: torch.device) -> Any:
    """The package, for that device, without what it prints as it is loaded."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed takes the device from it alone
    # It sets its own level as it is loaded, and writes to standard output, which belongs to results: a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # how it gathers
    import deepspeed

    return deepspeed


def check_config(config: Mapping[str, Any], device: torch.device, file: str) -> None:
    """Let DeepSpeed read a configuration that holds values of a user's.

    Args:
        file: Where they stand, for the error.

    Raises:
        RecipeError: for a value that it does not take.
    """
    import_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        with _quiet():
            DeepSpeedConfig(copy.deepcopy(dict(config)))
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{file}: DeepSpeed does not take it: {reason}", fix="mend that value") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints to standard output, which belongs to results."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
