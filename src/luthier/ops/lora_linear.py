"""Several frozen linear layers that read one input, each with low-rank updates of several slots.

Shapes: T rows sorted by slot, I inputs, O outputs, R rank.

For rows of slot s and layer l:    y = W_l x + b_l + c B_ls A_ls x,    c = alpha / r or alpha / sqrt(r)

`lora_linear_reference` states that with plain differentiable operations. `lora_linear` computes the same in one
autograd node: it adds the low-rank part into the base product's memory, runs the A-products of a slot's layers as one,
and sums the layers' input gradients in place. Both compute in the input's dtype or, if wider, the adapter's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.product import backward_product, forward_product


@dataclass(frozen=True, slots=True)
class LowRank:
    """One slot's update of one layer, over rows [start, end).

    Attributes:
        a_RI, b_OR: The factors, trainable, usually float32.
        scale: The factor c.
    """

    start: int
    end: int
    a_RI: Tensor
    b_OR: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class FrozenLinear:
    """A frozen layer's weight [O, I] and bias [O], with the updates that act on its rows."""

    weight_OI: Tensor
    bias_O: Tensor | None
    updates: tuple[LowRank, ...]


def lora_linear_reference(x_TI: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    """The outputs [T, O_l] of every layer, by plain operations. The definition that `lora_linear` is held against."""
    outputs = []
    for layer in layers:
        y_TO = F.linear(x_TI, layer.weight_OI, layer.bias_O)
        parts, done = [], 0
        for update in layer.updates:
            x_nI = x_TI[update.start : update.end].to(update.a_RI.dtype)
            low_nO = F.linear(F.linear(x_nI, update.a_RI), update.b_OR) * update.scale
            parts += [y_TO[done : update.start], (y_TO[update.start : update.end] + low_nO).to(y_TO.dtype)]
            done = update.end
        outputs.append(torch.cat([*parts, y_TO[done:]]) if parts else y_TO)
    return tuple(outputs)


def lora_linear(x_TI: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    """The outputs [T, O_l] of every layer, in one autograd node. The weights and biases get no gradient."""
    factors = [factor for layer in layers for update in layer.updates for factor in (update.a_RI, update.b_OR)]
    return _LoraLinear.apply(x_TI, layers, *factors)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, layers: Sequence[FrozenLinear], *factors: Tensor) -> tuple[Tensor, ...]:
        outputs = [forward_product(x_TI, layer.weight_OI, layer.bias_O) for layer in layers]
        lows: dict[tuple[int, int], Tensor] = {}
        for members in _by_rows(layers).values():
            start, end = members[0][2].start, members[0][2].end
            stacked_SI = _cat([update.a_RI for _, _, update in members])
            low_nS = x_TI[start:end].to(stacked_SI.dtype) @ stacked_SI.t()
            column = 0
            for index, position, update in members:
                rank = update.a_RI.shape[0]
                low_nR = low_nS[:, column : column + rank]
                column += rank
                _add_product(outputs[index][start:end], low_nR, update.b_OR.t(), update.scale)
                lows[index, position] = low_nR
        ctx.layers = layers
        ctx.order = list(lows)
        ctx.save_for_backward(x_TI, *lows.values())
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads_TO: Tensor) -> tuple[Tensor | None, ...]:
        layers: Sequence[FrozenLinear] = ctx.layers
        x_TI, *saved = ctx.saved_tensors
        lows = dict(zip(ctx.order, saved, strict=True))
        wants_input = ctx.needs_input_grad[0]
        grad_x_TI: Tensor | None = None
        if wants_input:
            for layer, grad_TO in zip(layers, grads_TO, strict=True):
                part = backward_product(grad_TO, layer.weight_OI)
                grad_x_TI = part if grad_x_TI is None else grad_x_TI.add_(part)
        gradients: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for members in _by_rows(layers).values():
            start, end = members[0][2].start, members[0][2].end
            dtype = members[0][2].a_RI.dtype
            grad_lows = []
            for index, position, update in members:
                grad_nO = grads_TO[index][start:end].to(dtype)
                grad_lows.append((grad_nO @ update.b_OR).mul_(update.scale))
                grad_b_OR = (grad_nO.t() @ lows[index, position]).mul_(update.scale)
                gradients[index, position] = (grad_b_OR, grad_b_OR)
            grad_low_nS = _cat(grad_lows, dim=1)
            grad_a_SI = grad_low_nS.t() @ x_TI[start:end].to(dtype)
            if grad_x_TI is not None:
                stacked_SI = _cat([update.a_RI for _, _, update in members])
                _add_product(grad_x_TI[start:end], grad_low_nS, stacked_SI, 1.0)
            row = 0
            for index, position, update in members:
                rank = update.a_RI.shape[0]
                gradients[index, position] = (grad_a_SI[row : row + rank], gradients[index, position][1])
                row += rank
        flat = [
            grad
            for index, layer in enumerate(layers)
            for position in range(len(layer.updates))
            for grad in gradients[index, position]
        ]
        return (grad_x_TI, None, *flat)


def _by_rows(layers: Sequence[FrozenLinear]) -> dict[tuple[int, int], list[tuple[int, int, LowRank]]]:
    """Updates over the same rows, across layers, so that their A-products run as one."""
    groups: dict[tuple[int, int], list[tuple[int, int, LowRank]]] = {}
    for index, layer in enumerate(layers):
        for position, update in enumerate(layer.updates):
            groups.setdefault((update.start, update.end), []).append((index, position, update))
    return groups


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale * left @ right, in place; through the wider dtype where they differ."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.add_((left @ right).mul_(scale).to(out.dtype))
