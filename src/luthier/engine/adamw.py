"""AdamW over named parameters, by torch or by bitsandbytes: the same update, its two moments kept in different ways.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   w = (1 - lr d) w - lr m^ / (sqrt(v^) + eps)

with m^ and v^ corrected for their start at zero. Loshchilov and Hutter 2019, arXiv:1711.05101. In 8 bits each block of
256 values of a moment has its own scale and a code of unequal steps: Dettmers et al. 2022, arXiv:2110.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier.engine.flat import FlatFactors
from luthier.extras import require_bitsandbytes
from luthier.types import TrainSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of m and v in a checkpoint, after the parameter's own."""

SMALLEST_QUANTIZED = 4096
"""bitsandbytes keeps the moments of a parameter with fewer values in float32."""

SMALLEST_PAGED = 100_000
"""bitsandbytes does not page the moments of a parameter with fewer values."""

STATE_BLOCK = 256
"""Values of an 8-bit moment that share a scale."""


class AdamW(Protocol):
    """What a job's optimizer asks of an implementation. Steps are counted by parameter: one that some steps gave no
    gradient counts fewer."""

    def step(self, rate: float) -> None:
        """Update every parameter that has a gradient, with this learning rate."""

    def zero_grad(self) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the parameters, by name; no copies."""

    def steps_of(self) -> dict[str, int]:
        """Parameter -> its own steps, of those that have had one."""

    def load_state(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Copy in what `state` and `steps_of` gave."""

    @property
    def state_bytes(self) -> int:
        """What the state will take on the parameters' device once every parameter has had a step."""


def make_adamw(
    parameters: Mapping[str, nn.Parameter],
    spec: TrainSpec,
    rate_ratios: Mapping[str, float] | None = None,
    flat: FlatFactors | None = None,
) -> AdamW:
    """The implementation that `spec.optimizer` names.

    Args:
        rate_ratios: Learning rates as multiples of the job's, of those parameters that have another.
        flat: Memory that some of the parameters share; torch's AdamW steps it as one where their rates are one.

    Raises:
        RecipeError: for one of bitsandbytes where that is not installed.
    """
    if flat is not None and spec.optimizer == "adamw" and not flat.spans.keys() & (rate_ratios or {}).keys():
        others = {name: p for name, p in parameters.items() if name not in flat.spans}
        return FlatAdamW(flat, make_adamw(others, spec, rate_ratios) if others else None, spec)
    by_ratio: dict[float, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_ratio.setdefault((rate_ratios or {}).get(name, 1.0), {})[name] = parameter
    kind = TorchAdamW if spec.optimizer == "adamw" else BitsandbytesAdamW
    return kind(by_ratio, spec)


class TorchAdamW:
    """Both moments in the parameter's own type.

    Args:
        by_ratio: Parameters by name, by the ratio of their learning rate to the job's.
    """

    def __init__(self, by_ratio: Mapping[float, Mapping[str, nn.Parameter]], spec: TrainSpec) -> None:
        self._parameters = {name: p for group in by_ratio.values() for name, p in group.items()}
        self._inner = torch.optim.AdamW(
            _groups(by_ratio),
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=True,
        )

    def step(self, rate: float) -> None:
        for group in self._inner.param_groups:
            group["lr"] = rate * group["rate_ratio"]
        self._inner.step()

    def zero_grad(self) -> None:
        self._inner.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        known = self._inner.state
        return {
            f"{name}.{moment}": known[parameter][moment]
            for name, parameter in self._parameters.items()
            if parameter in known
            for moment in MOMENTS
        }

    def steps_of(self) -> dict[str, int]:
        known = self._inner.state
        return {name: int(known[p]["step"]) for name, p in self._parameters.items() if p in known}

    def load_state(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        for name, num_steps in steps.items():
            parameter = self._parameters[name]
            moments = {
                moment: tensors[f"{name}.{moment}"].to(parameter.device, parameter.dtype).clone() for moment in MOMENTS
            }
            step = torch.tensor(float(num_steps)).to(parameter.device)
            self._inner.state[parameter] = {"step": step, **moments}

    @property
    def state_bytes(self) -> int:
        return sum(2 * p.numel() * p.element_size() for p in self._parameters.values())


class FlatAdamW:
    """Both moments of many parameters as one tensor each, stepped in one launch.

    Args:
        flat: Those parameters' memory. All of them have a gradient at every step.
        others: What steps the parameters outside it.
    """

    def __init__(self, flat: FlatFactors, others: AdamW | None, spec: TrainSpec) -> None:
        self._flat, self._others = flat, others
        self._inner = TorchAdamW({1.0: {"": flat.values_Z}}, spec)

    def step(self, rate: float) -> None:
        self._inner.step(rate)
        if self._others is not None:
            self._others.step(rate)

    def zero_grad(self) -> None:
        self._flat.grad_Z.zero_()
        if self._others is not None:
            self._others.zero_grad()

    def state(self) -> dict[str, Tensor]:
        whole = self._inner.state()
        views = {
            f"{name}.{moment}": self._flat.view(whole[f".{moment}"], name)
            for name in (self._flat.spans if whole else ())
            for moment in MOMENTS
        }
        return views | (self._others.state() if self._others is not None else {})

    def steps_of(self) -> dict[str, int]:
        steps = dict.fromkeys(self._flat.spans, next(iter(self._inner.steps_of().values()), 0))
        steps = {name: count for name, count in steps.items() if count}
        return steps | (self._others.steps_of() if self._others is not None else {})

    def load_state(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        whole = {f".{moment}": torch.zeros_like(self._flat.values_Z) for moment in MOMENTS}
        for name in self._flat.spans:
            for moment in MOMENTS:
                self._flat.view(whole[f".{moment}"], name).copy_(tensors[f"{name}.{moment}"])
        self._inner.load_state(whole, {"": max(steps[name] for name in self._flat.spans)})
        if self._others is not None:
            rest = {name: count for name, count in steps.items() if name not in self._flat.spans}
            self._others.load_state(tensors, rest)

    @property
    def state_bytes(self) -> int:
        return self._inner.state_bytes + (self._others.state_bytes if self._others is not None else 0)


class BitsandbytesAdamW:
    """The moments in 8 bits, or in memory that the driver may move to the host (paged), or both.

    A parameter of fewer than `SMALLEST_QUANTIZED` values keeps float32 moments, as bitsandbytes has it: LoRA's factors
    of a narrow layer are often that small.

    Args:
        by_ratio: As in `TorchAdamW`; all in float32.
    """

    _PARTS = (("state1", "absmax1", "qmap1"), ("state2", "absmax2", "qmap2"))

    def __init__(self, by_ratio: Mapping[float, Mapping[str, nn.Parameter]], spec: TrainSpec) -> None:
        require_bitsandbytes(f"train.optimizer: {spec.optimizer}")
        from bitsandbytes.optim import AdamW as Inner

        self._parameters = {name: p for group in by_ratio.values() for name, p in group.items()}
        odd = next((name for name, p in self._parameters.items() if p.dtype != torch.float32), None)
        if odd is not None:
            raise ValueError(f"{odd} is {self._parameters[odd].dtype}; bitsandbytes steps float32 alone here")
        self._places = {
            name: (at, index) for at, group in enumerate(by_ratio.values()) for index, name in enumerate(group)
        }
        self._is_8bit = spec.optimizer.endswith("8bit")
        self._is_paged = spec.optimizer.startswith("paged")
        self._inner = Inner(
            _groups(by_ratio),
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            optim_bits=8 if self._is_8bit else 32,
            min_8bit_size=SMALLEST_QUANTIZED,
            is_paged=self._is_paged,
        )

    def step(self, rate: float) -> None:
        for group in self._inner.param_groups:
            group["lr"] = rate * group["rate_ratio"]
        self._inner.step()

    def zero_grad(self) -> None:
        self._inner.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter not in self._inner.state:
                continue
            known = self._inner.state[parameter]
            for moment, (values, scales, code) in zip(MOMENTS, self._PARTS, strict=True):
                tensors[f"{name}.{moment}"] = known[values]
                if scales in known:
                    tensors[f"{name}.{moment}.scales"] = known[scales]
                    tensors[f"{moment}.code"] = known[code]  # the same for every parameter
        return tensors

    def steps_of(self) -> dict[str, int]:
        known = self._inner.state
        return {name: int(known[p]["step"]) for name, p in self._parameters.items() if p in known}

    def load_state(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        codes: dict[str, Tensor] = {}
        for name in steps:
            parameter, (group, index) = self._parameters[name], self._places[name]
            # bitsandbytes makes the room itself, for it may be paged; the values are copied into it.
            self._inner.init_state(self._inner.param_groups[group], parameter, group, index)
            known: dict[str, Any] = self._inner.state[parameter]
            known["step"] = steps[name]
            for moment, (values, scales, code) in zip(MOMENTS, self._PARTS, strict=True):
                known[values].copy_(tensors[f"{name}.{moment}"])
                if scales in known:
                    known[scales].copy_(tensors[f"{name}.{moment}.scales"])
                    if moment not in codes:
                        codes[moment] = tensors[f"{moment}.code"].to(parameter.device).clone()
                    known[code] = codes[moment]

    @property
    def state_bytes(self) -> int:
        return sum(self._bytes_of(parameter.numel()) for parameter in self._parameters.values())

    def _bytes_of(self, num_values: int) -> int:
        scales = 0
        if self._is_8bit and num_values >= SMALLEST_QUANTIZED:
            width, scales = 1, 2 * 4 * -(-num_values // STATE_BLOCK)
        else:
            width = 4
        # Paged moments leave the device when room is short, so that they are no need that could not be met.
        resident = 0 if self._is_paged and num_values >= SMALLEST_PAGED else 2 * width * num_values
        return resident + scales


def _groups(by_ratio: Mapping[float, Mapping[str, nn.Parameter]]) -> list[dict[str, Any]]:
    return [{"params": list(group.values()), "rate_ratio": ratio} for ratio, group in by_ratio.items()]
