"""Next-token prediction: the negative log-likelihood of each supervised token.

Shapes: P supervised positions, D hidden size, V vocabulary.

    nll_p = logsumexp(z_p) - z_p[target_p],    z_p = W h_p + b

`next_token_nll_reference` states it over logits. `frozen_head_nll` fuses a frozen plain output layer with its loss: it
walks over the positions in chunks, so that only a chunk's logits exist at a time, and forms the gradient with respect
to the hidden states at once, (softmax(z) - onehot) W, while they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.capability import runs_kernels
from luthier.ops.product import backward_product, forward_product

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk's float32 logits."""

GPU_CHUNK_ROWS = 4096
"""Rows of a chunk on a GPU, whose products want many; its logits stay in the base's dtype."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Attributes:
    nll_P: float32 or wider; differentiable while training.
    is_correct_P: bool, whether the most likely token is the target.
    """

    nll_P: Tensor
    is_correct_P: Tensor


def next_token_nll_reference(logits_PV: Tensor, targets_P: Tensor) -> TokenScores:
    """The definition, over logits that exist; float32 or wider inside."""
    wide_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    nll_P = F.cross_entropy(wide_PV, targets_P, reduction="none")
    return TokenScores(nll_P, wide_PV.detach().argmax(dim=-1) == targets_P)


def frozen_head_nll(hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor) -> TokenScores:
    """The same for a frozen plain output layer, without keeping logits."""
    node = _KernelFrozenHead if hidden_PD.dtype == torch.bfloat16 and runs_kernels(hidden_PD) else _FrozenHead
    nll_P, is_correct_P = node.apply(hidden_PD, weight_VD, bias_V, targets_P)
    return TokenScores(nll_P, is_correct_P)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_PD.dtype, torch.float32)
        num_rows = max(8, CHUNK_BYTES // (4 * weight_VD.shape[0]))
        nll_P = torch.empty(hidden_PD.shape[0], dtype=wide, device=hidden_PD.device)
        is_correct_P = torch.empty(hidden_PD.shape[0], dtype=torch.bool, device=hidden_PD.device)
        grad_PD = torch.empty_like(hidden_PD) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden_PD.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            target_c = targets_P[rows]
            logits_cV = forward_product(hidden_PD[rows], weight_VD, bias_V).to(wide)
            best_c, at_c = logits_cV.max(dim=-1, keepdim=True)
            is_correct_P[rows] = at_c[:, 0] == target_c
            picked_c1 = logits_cV.gather(1, target_c[:, None])
            logits_cV.sub_(best_c).exp_()
            total_c1 = logits_cV.sum(dim=-1, keepdim=True)
            nll_P[rows] = (total_c1.log() + best_c - picked_c1)[:, 0]
            if grad_PD is not None:
                logits_cV.div_(total_c1)
                logits_cV.scatter_add_(1, target_c[:, None], torch.full_like(picked_c1, -1.0))
                grad_PD[rows] = backward_product(logits_cV.to(hidden_PD.dtype), weight_VD)
        if grad_PD is not None:
            ctx.save_for_backward(grad_PD)
        ctx.mark_non_differentiable(is_correct_P)
        return nll_P, is_correct_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_PD,) = ctx.saved_tensors
        return (grad_PD * grads[0][:, None].to(grad_PD.dtype)), None, None, None


class _KernelFrozenHead(torch.autograd.Function):
    """The same where a kernel turns a chunk's logits into loss and gradient in their own memory."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
    ) -> tuple[Tensor, Tensor]:
        nll_P, is_correct_P, grad_PD = _head_by_kernel(
            hidden_PD, weight_VD, bias_V, targets_P, wants_grad=ctx.needs_input_grad[0]
        )
        if grad_PD is not None:
            ctx.save_for_backward(grad_PD)
        ctx.mark_non_differentiable(is_correct_P)
        return nll_P, is_correct_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_PD,) = ctx.saved_tensors
        return grad_PD.mul_(grads[0][:, None]), None, None, None


def frozen_head_gradient(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, whether its likeliest token is the target, and the loss's gradient [P, D], without autograd."""
    if hidden_PD.dtype == torch.bfloat16 and runs_kernels(hidden_PD):
        nll_P, is_correct_P, grad_PD = _head_by_kernel(hidden_PD, weight_VD, bias_V, targets_P, wants_grad=True)
        assert grad_PD is not None
        return nll_P, is_correct_P, grad_PD
    with torch.enable_grad():
        leaf_PD = hidden_PD.detach().requires_grad_()
        scores = frozen_head_nll(leaf_PD, weight_VD, bias_V, targets_P)
        (found_PD,) = torch.autograd.grad(scores.nll_P.sum(), leaf_PD)
    return scores.nll_P.detach(), scores.is_correct_P, found_PD


def _head_by_kernel(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor, *, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from luthier.ops.kernels.cross_entropy import cross_entropy_

    nll_P = torch.empty(hidden_PD.shape[0], dtype=torch.float32, device=hidden_PD.device)
    is_correct_P = torch.empty(hidden_PD.shape[0], dtype=torch.bool, device=hidden_PD.device)
    grad_PD = torch.empty_like(hidden_PD) if wants_grad else None
    for start in range(0, hidden_PD.shape[0], GPU_CHUNK_ROWS):
        rows = slice(start, start + GPU_CHUNK_ROWS)
        logits_cV = F.linear(hidden_PD[rows], weight_VD, bias_V)
        cross_entropy_(logits_cV, targets_P[rows], nll_P[rows], is_correct_P[rows], wants_grad)
        if grad_PD is not None:
            torch.mm(logits_cV, weight_VD, out=grad_PD[rows])
    return nll_P, is_correct_P, grad_PD
