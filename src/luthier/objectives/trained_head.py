"""Next-token prediction through an output layer that is trained itself.

Shapes: P supervised positions, D hidden size, V vocabulary, c positions of a chunk.

    nll_p = logsumexp(z_p) - z_p[target_p],    z_p = W h_p + b
    dz_p = g_p (softmax(z_p) - onehot(target_p)),    dh = dz W,    dW = dz^T h,    db = sum dz

for the upstream gradient g. As in `language_modelling.frozen_head_nll` only a chunk's logits exist at a time. Since dW
needs g, the backward computes each chunk's logits once more: a fourth product instead of a P x V matrix.
`language_modelling.next_token_nll_reference` over logits is the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.objectives import language_modelling
from luthier.objectives.language_modelling import TokenScores


def trained_head_nll(hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor) -> TokenScores:
    """Scores that are differentiable in hidden states, weight and bias; float32 or wider inside.

    Gradients of weight and bias are added up over the chunks in float32 or wider, then given in their own dtype.
    """
    nll_P, is_correct_P = _TrainedHead.apply(hidden_PD, weight_VD, bias_V, targets_P)
    return TokenScores(nll_P, is_correct_P)


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_PD.dtype, torch.float32)
        nll_P = torch.empty(hidden_PD.shape[0], dtype=wide, device=hidden_PD.device)
        total_P = torch.empty_like(nll_P)
        is_correct_P = torch.empty(hidden_PD.shape[0], dtype=torch.bool, device=hidden_PD.device)
        for rows in _chunks(hidden_PD, weight_VD):
            logits_cV = _logits(hidden_PD[rows], weight_VD, bias_V).to(wide)
            total_P[rows] = logits_cV.logsumexp(dim=-1)
            nll_P[rows] = total_P[rows] - logits_cV.gather(1, targets_P[rows, None])[:, 0]
            is_correct_P[rows] = logits_cV.argmax(dim=-1) == targets_P[rows]
        ctx.save_for_backward(hidden_PD, weight_VD, bias_V, targets_P, total_P)
        ctx.mark_non_differentiable(is_correct_P)
        return nll_P, is_correct_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PD, weight_VD, bias_V, targets_P, total_P = ctx.saved_tensors
        grad_P, wide = grads[0], total_P.dtype
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        hidden_grad_PD = torch.empty_like(hidden_PD) if needs_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        for rows in _chunks(hidden_PD, weight_VD):
            change_cV = _logits(hidden_PD[rows], weight_VD, bias_V).to(wide).sub_(total_P[rows, None]).exp_()
            minus_c1 = change_cV.new_full((change_cV.shape[0], 1), -1.0)
            change_cV.scatter_add_(1, targets_P[rows, None], minus_c1).mul_(grad_P[rows, None])
            narrow_cV = change_cV.to(hidden_PD.dtype)
            if hidden_grad_PD is not None:
                hidden_grad_PD[rows] = narrow_cV @ weight_VD
            if weight_grad_VD is not None:
                _add_product(weight_grad_VD, narrow_cV, hidden_PD[rows])
            if bias_grad_V is not None:
                bias_grad_V += change_cV.sum(dim=0)
        return (
            hidden_grad_PD,
            None if weight_grad_VD is None else weight_grad_VD.to(weight_VD.dtype),
            None if bias_grad_V is None or bias_V is None else bias_grad_V.to(bias_V.dtype),
            None,
        )


def _logits(hidden_cD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden_cD, weight_VD, bias_V)


def _add_product(sum_VD: Tensor, change_cV: Tensor, hidden_cD: Tensor) -> None:
    if sum_VD.dtype == change_cV.dtype:
        sum_VD.addmm_(change_cV.t(), hidden_cD)
    else:
        sum_VD += change_cV.t() @ hidden_cD


def _chunks(hidden_PD: Tensor, weight_VD: Tensor) -> list[slice]:
    num_rows = max(8, language_modelling.CHUNK_BYTES // (4 * weight_VD.shape[0]))
    return [slice(start, start + num_rows) for start in range(0, hidden_PD.shape[0], num_rows)]
