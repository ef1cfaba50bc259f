"""RMS normalization with a frozen weight (Zhang and Sennrich 2019, arXiv:1910.07467).

Shapes: T rows, D features.

    y = w * x / sqrt(mean(x^2) + eps)
    dx = (g w - n mean(g w n)) / sqrt(mean(x^2) + eps),    n = x / sqrt(mean(x^2) + eps)

As in transformers, the normalization runs in float32 for an input of fewer bits, and its result is rounded to the
input's dtype before the weight multiplies it. float64 stays float64, where transformers rounds to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.ops.capability import runs_kernels


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized rows, and each row's inverse root mean square (float32 or wider) for the backward."""
    if runs_kernels(x_TD):
        from luthier.ops.kernels import norm

        return norm.rms_norm(x_TD, weight_D, eps)
    return rms_norm_reference(x_TD, weight_D, eps)


def rms_norm_backward_(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, inverse_T: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """The input's gradient, added to `residual_TD` in place where that is given.

    `grad_TD` is overwritten with the forward's output, which a layer that read it needs for its own factors.
    """
    if runs_kernels(x_TD):
        from luthier.ops.kernels import norm

        return norm.rms_norm_backward(grad_TD, x_TD, weight_D, inverse_T, residual_TD)
    return rms_norm_backward_reference_(grad_TD, x_TD, weight_D, inverse_T, residual_TD)


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    inverse_T = torch.rsqrt(wide_TD.pow(2).mean(dim=-1) + eps)
    return weight_D * (wide_TD * inverse_T[:, None]).to(x_TD.dtype), inverse_T


def rms_norm_backward_reference_(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, inverse_T: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    wide = inverse_T.dtype
    normal_TD = x_TD.to(wide) * inverse_T[:, None]
    weighted_TD = grad_TD.to(wide) * weight_D.to(wide)
    shared_T1 = (weighted_TD * normal_TD).mean(dim=-1, keepdim=True)
    result_TD = (weighted_TD - normal_TD * shared_T1) * inverse_T[:, None]
    grad_TD.copy_(normal_TD.to(x_TD.dtype) * weight_D)
    return result_TD.to(x_TD.dtype) if residual_TD is None else residual_TD.add_(result_TD.to(residual_TD.dtype))
