"""Outputs of a linear layer whose rows some slots multiply by a factor an output, and its bias.

Shapes: T rows sorted by slot, O outputs.

For rows of a slot with the factors g:    y = g * u + b,    or g * (u + b);    for all others:    y = u + b

`row_gains_reference` states that with plain differentiable operations. `row_gains` computes the same in one autograd
node, in u's own memory, and keeps for its backward the rows alone that are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowGain:
    """One slot's factors of one layer, over rows [start, end).

    Attributes:
        gain_O: The factors, usually float32.
        spans_bias: Whether they multiply the bias too.
    """

    start: int
    end: int
    gain_O: Tensor
    spans_bias: bool


def row_gains_reference(u_TO: Tensor, bias_O: Tensor | None, gains: Sequence[RowGain]) -> Tensor:
    """The outputs [T, O], by plain operations. The definition that `row_gains` is held against."""
    bias = 0.0 if bias_O is None else bias_O
    parts, done = [], 0
    for gain in gains:
        u_nO = u_TO[gain.start : gain.end]
        y_nO = gain.gain_O * (u_nO + bias) if gain.spans_bias else gain.gain_O * u_nO + bias
        parts += [u_TO[done : gain.start] + bias, y_nO.to(u_TO.dtype)]
        done = gain.end
    return torch.cat([*parts, u_TO[done:] + bias])


def row_gains(u_TO: Tensor, bias_O: Tensor | None, gains: Sequence[RowGain]) -> Tensor:
    """The outputs [T, O], in one autograd node that writes over `u_TO`. The bias gets no gradient."""
    return _RowGains.apply(u_TO, bias_O, gains, *(gain.gain_O for gain in gains))


class _RowGains(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_TO: Tensor, bias_O: Tensor | None, gains: Sequence[RowGain], *factors_O: Tensor) -> Tensor:
        ctx.mark_dirty(u_TO)
        kept, done = [], 0
        for gain in gains:
            if bias_O is not None:
                u_TO[done : gain.start].add_(bias_O)
            rows_nO = u_TO[gain.start : gain.end]
            if bias_O is not None and gain.spans_bias:
                rows_nO.add_(bias_O)
            kept.append(rows_nO.clone())
            # Through the factors' own dtype: one near 1 would be 1 in bfloat16.
            product_nO = kept[-1] * gain.gain_O
            rows_nO.copy_(product_nO if bias_O is None or gain.spans_bias else product_nO.add_(bias_O))
            done = gain.end
        if bias_O is not None:
            u_TO[done:].add_(bias_O)
        ctx.gains = [(gain.start, gain.end) for gain in gains]
        ctx.save_for_backward(*factors_O, *kept)
        return u_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,) = grads
        num_gains = len(ctx.gains)
        factors_O, kept = ctx.saved_tensors[:num_gains], ctx.saved_tensors[num_gains:]
        grad_u_TO = grad_TO.clone() if ctx.needs_input_grad[0] else None
        grad_factors: list[Tensor | None] = []
        for index, (start, end) in enumerate(ctx.gains):
            rows_nO = grad_TO[start:end]
            wants = ctx.needs_input_grad[3 + index]
            grad_factors.append((rows_nO.to(factors_O[index].dtype) * kept[index]).sum(dim=0) if wants else None)
            if grad_u_TO is not None:
                grad_u_TO[start:end] = rows_nO * factors_O[index]
        return (grad_u_TO, None, None, *grad_factors)
