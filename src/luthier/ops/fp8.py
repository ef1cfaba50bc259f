"""A frozen linear layer held in fp8 (e4m3), with products in fp8 where the GPU has them.

Shapes: T rows, I inputs, O outputs, K columns of a row.

    W_o = s_o Q_o           each row of the weight has its own scale, s_o = max |W_o| / 448
    x W^T = (t x^) Q^T s    each row of the input is rounded likewise, t = max |x| / 448
    g W   = (u (g s)^) Q    the weight's scales move into the gradient before it is rounded

so that one copy of the weight serves both products at half of bfloat16's bytes. e4m3 keeps four significant bits: a
value moves by at most 1/16 of itself. Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.capability import fp8_problem, runs_kernels

LARGEST = 448.0
"""The largest finite number of e4m3."""

ALIGNMENT = 16
"""The GPU's fp8 product takes sizes that are multiples of this."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [O, I] in e4m3.

    Attributes:
        values_OI: float8_e4m3fn.
        scales_O: float32.
        dtype: What its products give.
    """

    values_OI: Tensor
    scales_O: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values_OI.shape

    @property
    def num_values(self) -> int:
        return self.values_OI.numel()

    @property
    def device(self) -> torch.device:
        return self.values_OI.device

    @property
    def num_bytes(self) -> int:
        return self.num_values + self.scales_O.numel() * 4

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as numbers."""
        wide = torch.promote_types(dtype or self.dtype, torch.float32)
        return (self.values_OI.to(wide) * self.scales_O[:, None].to(wide)).to(dtype or self.dtype)


def quantize_weight(weight_OI: Tensor) -> Fp8Weight:
    """Round a weight to e4m3, a scale a row."""
    values_OI, scales_O1 = quantize_rows_reference(weight_OI.detach())
    return Fp8Weight(values_OI, scales_O1[:, 0], weight_OI.dtype)


def fits_fp8(weight_OI: Tensor) -> bool:
    """Whether the GPU's product takes a weight of this shape."""
    return all(size % ALIGNMENT == 0 for size in weight_OI.shape)


def fp8_forward(x: Tensor, weight: Fp8Weight, bias_O: Tensor | None) -> Tensor:
    """x W^T + b over the last dimension of x, in its dtype."""
    x_TI = x.reshape(-1, x.shape[-1])
    if _runs(x_TI):
        values_TI, scales_T1 = quantize_rows(x_TI)
        y_TO = torch._scaled_mm(
            values_TI, weight.values_OI.t(), scales_T1, weight.scales_O[None, :],
            out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        y_TO = y_TO if bias_O is None else y_TO.add_(bias_O)
    else:
        y_TO = F.linear(_rounded(x_TI), weight.dense(x.dtype), bias_O)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def fp8_backward(grad: Tensor, weight: Fp8Weight) -> Tensor:
    """g W over the last dimension of g, in its dtype."""
    grad_TO = grad.reshape(-1, grad.shape[-1])
    if _runs(grad_TO):
        from luthier.ops.kernels.fp8 import transposed

        values_TO, scales_T1 = quantize_rows(grad_TO, weight.scales_O)
        values_IO = transposed(weight.values_OI)  # the product wants its sum over the inner dimension of both
        ones_1I = torch.ones(1, values_IO.shape[0], dtype=torch.float32, device=grad.device)
        out_TI = torch._scaled_mm(
            values_TO, values_IO.t(), scales_T1, ones_1I, out_dtype=grad.dtype, use_fast_accum=True
        )
    else:
        wide = torch.promote_types(grad.dtype, torch.float32)
        out_TI = (_rounded(grad_TO.to(wide) * weight.scales_O.to(wide)) @ weight.values_OI.to(wide)).to(grad.dtype)
    return out_TI.view(*grad.shape[:-1], out_TI.shape[-1])


def quantize_rows(x_TK: Tensor, factors_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 values [T, K] and float32 scales [T, 1] of x, or of x times `factors_K`, a scale a row."""
    if runs_kernels(x_TK):
        from luthier.ops.kernels import fp8

        return fp8.quantize_rows(x_TK, factors_K)
    return quantize_rows_reference(x_TK, factors_K)


def quantize_rows_reference(x_TK: Tensor, factors_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    wide_TK = x_TK.to(torch.float32) if factors_K is None else x_TK.to(torch.float32) * factors_K
    scales_T1 = wide_TK.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (wide_TK / scales_T1).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales_T1


def _rounded(x_TK: Tensor) -> Tensor:
    """What the fp8 product reads in place of x: on any device the plain path computes what a GPU does."""
    values_TK, scales_T1 = quantize_rows_reference(x_TK)
    return values_TK.to(x_TK.dtype) * scales_T1.to(x_TK.dtype)


def _runs(x_TK: Tensor) -> bool:
    return x_TK.is_cuda and x_TK.dtype == torch.bfloat16 and not fp8_problem()
