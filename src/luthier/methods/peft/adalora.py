"""What AdaLoRA does around each optimizer step: a regularizer before it, a cut of ranks after it.

    W' = W + (s / r) P diag(l) Q,    loss + w mean(|P^T P - I|_F, |Q Q^T - I|_F)

Zhang et al. 2023, arXiv:2303.10512. The importance of each triplet of P, l and Q is smoothed over the steps; every cut
sets the l of the least important to 0, by a budget that falls with the cube of the remaining steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaloraHooks:
    """`peft.AdaLoraModel` holds the parameters and the allocator; this calls them at the right moments.

    Args:
        model: peft's AdaLoraModel.
        adapter: The adapter's name in it.
    """

    def __init__(self, model: Any, adapter: str) -> None:
        self._model = model
        self._config = model.peft_config[adapter]
        self._adapter = adapter

    def before_step(self) -> None:
        """Add the regularizer's gradient, once an optimizer batch however it was split."""
        if self._config.orth_reg_weight > 0:
            (self._config.orth_reg_weight * self.regularizer()).backward()

    def regularizer(self) -> Tensor:
        """Mean distance of the factors' Gram matrices from the identity, as peft's forward computes it."""
        distances = []
        for name, factor in self._model.model.named_parameters():
            if self._adapter in name and ("lora_A" in name or "lora_B" in name):
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)))
        return torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        """Measure importance with the step's gradients, and cut ranks where it is time."""
        self._model.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """The rank that is left in each layer: entries of l that are not 0."""
        return {name: int(values.count_nonzero()) for name, values in self._singular_values().items()}

    def keep_what_is_left(self) -> None:
        """Let peft's config say which triplets are left, so that files hold these and no others."""
        self._config.rank_pattern = {
            name: (values.detach().flatten() != 0).tolist() for name, values in self._singular_values().items()
        }

    def state(self) -> dict[str, Tensor]:
        allocator = self._model.rankallocator
        tensors = {
            f"adalora.{average}.{name}": value
            for average in _AVERAGES
            for name, value in getattr(allocator, average).items()
        }
        for name, kept in (self._config.rank_pattern or {}).items():
            tensors[f"adalora.pattern.{name}"] = torch.tensor(kept, dtype=torch.uint8)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        allocator = self._model.rankallocator
        for average in _AVERAGES:
            setattr(allocator, average, _part(tensors, f"adalora.{average}."))
        pattern = _part(tensors, "adalora.pattern.")
        self._config.rank_pattern = {name: kept.bool().tolist() for name, kept in pattern.items()} or None

    def _singular_values(self) -> dict[str, Tensor]:
        return {n: p for n, p in self._model.model.named_parameters() if f"lora_E.{self._adapter}" in n}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(prefix)}
