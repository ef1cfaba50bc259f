"""LongRoPE chosen per sequence.

transformers picks a LongRoPE model's short or long factors by the longest position of the whole forward, so that one
long neighbour changes every short sequence beside it. Here each sequence gets the factors that it would get alone: the
model's own rotary module runs once per class, and each token takes the result of its sequence's class.

Shapes: B rows, L positions a row (packed: B = 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PerSequenceRotary(nn.Module):
    """Wraps a LongRoPE rotary module.

    Args:
        rotary: The model's own module; `rotary(x, position_ids) -> (cos, sin)`.
        short_positions: Most positions of a sequence that uses the short factors.
    """

    def __init__(self, rotary: nn.Module, short_positions: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.short_positions = short_positions
        self.is_long_BL: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        long_BL = self.is_long_BL
        if long_BL is None or not bool(long_BL.any()):
            inside = position_ids if long_BL is None else position_ids.clamp(max=self.short_positions - 1)
            return self.rotary(x, inside, *others, **named)
        # The module reads the class off the largest position: mask the other class's positions out of its sight. A
        # class is a whole sequence, so short tokens lie below `short_positions` and any long sequence reaches past it.
        masked_BL = position_ids * long_BL
        reach = masked_BL.new_full((masked_BL.shape[0], 1), self.short_positions)
        long_positions = torch.cat([masked_BL, reach], dim=1)
        cos_long, sin_long = self.rotary(x, long_positions, *others, **named)
        cos_long, sin_long = cos_long[:, :-1].clone(), sin_long[:, :-1].clone()
        # Padding of a short row may stand past the limit; it is never read, but it would choose the factors.
        short_positions = (position_ids * ~long_BL).clamp(max=self.short_positions - 1)
        cos, sin = self.rotary(x, short_positions, *others, **named)
        chosen = long_BL[..., None]
        return torch.where(chosen, cos_long, cos), torch.where(chosen, sin_long, sin)


def wrap_longrope(model: nn.Module) -> list[PerSequenceRotary]:
    """Wrap every LongRoPE rotary module of `model` in place; an empty list where there is none."""
    wrapped = []
    for name, module in list(model.named_modules()):
        if getattr(module, "rope_type", None) != "longrope":
            continue
        limit = longrope_short_positions(module.config)
        wrapper = PerSequenceRotary(module, limit)
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, wrapper)
        wrapped.append(wrapper)
    return wrapped


def longrope_short_positions(config: Any) -> int:
    """Most positions of a sequence that LongRoPE's short factors serve."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limit = parameters.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(limit or config.max_position_embeddings)
