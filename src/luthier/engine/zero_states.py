"""Bytes of model states a rank under ZeRO: the formulas of Rajbhandari et al. 2020, arXiv:1910.02054, section 5.

With F frozen and T trained values, w bytes each, over N ranks:

    stage    weights           gradients    optimizer
    0        (F + T) w         T g          T k0
    1        (F + T) w         T w          T K / N
    2        (F + T) w         T w / N      T K / N
    3        (F + T) w / N     T w / N      T K / N

K = 12: DeepSpeed keeps a float32 copy of what it steps and two moments, whatever w is. The paper has w = 2 and F = 0.
Stage 0 is Luthier's own: float32 weights are stepped where they are (g = 4, k0 = 8), narrower ones have float32 masters
that gradients are added up in (g = 4, k0 = 12).

A bound from below: buckets and padding come on top, weights of small layers stay whole at stage 3, and the last
micro-batch's gradients are there at once before they are shared out.
"""

from __future__ import annotations

from dataclasses import dataclass

STEPPED_BYTES = 12
"""K: of a value that DeepSpeed steps."""


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Bytes of one rank on its device.

    Attributes:
        weights: Frozen and trained.
        gradients, optimizer: Of the trained.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def model_states(num_frozen: int, num_trained: int, itemsize: int, stage: int, num_ranks: int) -> ModelStates:
    """What one of `num_ranks` ranks holds at a stage, nothing offloaded.

    Args:
        itemsize: Bytes of a weight, w.
    """
    weights = (num_frozen + num_trained) * itemsize
    if stage == 0:
        return ModelStates(weights, num_trained * 4, num_trained * (STEPPED_BYTES if itemsize < 4 else 8))
    return ModelStates(
        _part(weights, num_ranks if stage >= 3 else 1),
        _part(num_trained * itemsize, num_ranks if stage >= 2 else 1),
        _part(num_trained * STEPPED_BYTES, num_ranks),
    )


def _part(num_bytes: int, num_ranks: int) -> int:
    return -(-num_bytes // num_ranks)
