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

from luthier.ops.nf4 import FrozenWeight, dense_weight
from luthier.ops.product import backward_product, forward_product


@dataclass(frozen=True, slots=True)
class LowRank:
    """One slot's update of one layer, over rows [start, end).

    Attributes:
        a_RI, b_OR: The factors, usually float32; those that do not require a gradient get none.
        scale: The factor c.
    """

    start: int
    end: int
    a_RI: Tensor
    b_OR: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class FrozenLinear:
    """A frozen layer's weight [O, I], plain or in NF4, and bias [O], with the updates that act on its rows, in order.

    Several updates may act on the same rows, and add up; others must not overlap.
    """

    weight_OI: FrozenWeight
    bias_O: Tensor | None
    updates: tuple[LowRank, ...]


def lora_linear_reference(x_TI: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    """The outputs [T, O_l] of every layer, by plain operations. The definition that `lora_linear` is held against."""
    outputs = []
    for layer in layers:
        y_TO = F.linear(x_TI, dense_weight(layer.weight_OI, x_TI.dtype), layer.bias_O)
        parts, done = [], 0
        for (start, end), updates in _by_rows([layer]).items():
            y_nO = y_TO[start:end]
            for _, _, update in updates:
                x_nI = x_TI[start:end].to(update.a_RI.dtype)
                y_nO = y_nO + F.linear(F.linear(x_nI, update.a_RI), update.b_OR) * update.scale
            parts += [y_TO[done:start], y_nO.to(y_TO.dtype)]
            done = end
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
            products: dict[int, list[Product]] = {}
            for index, position, update in members:
                rank = update.a_RI.shape[0]
                low_nR = low_nS[:, column : column + rank]
                column += rank
                products.setdefault(index, []).append((low_nR, update.b_OR.t(), update.scale))
                lows[index, position] = low_nR
            for index, parts in products.items():
                _add_products(outputs[index][start:end], parts)
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
        gradients: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}
        for members in _by_rows(layers).values():
            members.sort(key=_is_frozen)  # the trained ones first, so that their part of the products is one slice
            start, end = members[0][2].start, members[0][2].end
            dtype = members[0][2].a_RI.dtype
            grad_lows = []
            for index, position, update in members:
                grad_nO = grads_TO[index][start:end].to(dtype)
                grad_lows.append((grad_nO @ update.b_OR).mul_(update.scale))
                grad_b_OR = None
                if update.b_OR.requires_grad:
                    grad_b_OR = (grad_nO.t() @ lows[index, position]).mul_(update.scale)
                gradients[index, position] = (None, grad_b_OR)
            grad_low_nS = _cat(grad_lows, dim=1)
            num_trained = sum(member[2].a_RI.shape[0] for member in members if not _is_frozen(member))
            grad_a_SI = grad_low_nS[:, :num_trained].t() @ x_TI[start:end].to(dtype)
            if grad_x_TI is not None:
                stacked_SI = _cat([update.a_RI for _, _, update in members])
                _add_products(grad_x_TI[start:end], [(grad_low_nS, stacked_SI, 1.0)])
            row = 0
            for index, position, update in members:
                if _is_frozen((index, position, update)):
                    continue
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


Member = tuple[int, int, LowRank]
"""A layer's index, an update's position within it, and the update."""

Product = tuple[Tensor, Tensor, float]
"""left, right and scale of scale * left @ right."""


def _is_frozen(member: Member) -> bool:
    return not member[2].a_RI.requires_grad


def _by_rows(layers: Sequence[FrozenLinear]) -> dict[tuple[int, int], list[Member]]:
    """Updates over the same rows, across layers, so that their A-products run as one."""
    groups: dict[tuple[int, int], list[Member]] = {}
    for index, layer in enumerate(layers):
        for position, update in enumerate(layer.updates):
            groups.setdefault((update.start, update.end), []).append((index, position, update))
    return groups


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _add_products(out: Tensor, parts: list[Product]) -> None:
    """out += each product, in place; where the dtypes differ, their sum in the wider one, rounded once."""
    if out.dtype == parts[0][0].dtype:
        for left, right, scale in parts:
            out.addmm_(left, right, alpha=scale)
        return
    total, *others = [(left @ right).mul_(scale) for left, right, scale in parts]
    for other in others:
        total.add_(other)
    out.add_(total.to(out.dtype))
