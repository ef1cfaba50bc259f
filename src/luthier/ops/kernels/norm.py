"""RMS normalization, forward and backward to the input; one program a row.

Shapes: T rows, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(x, weight, out, inverse, stride, num_columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / num_columns + eps)
    tl.store(inverse + row, rstd)
    low = out.dtype.element_ty
    normal = (values * rstd).to(low).to(tl.float32)
    scaled = normal * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * num_columns + columns, scaled.to(low), mask=inside)


@triton.jit
def _backward(grad, x, weight, inverse, residual, num_columns, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """`residual` (or a fresh tensor, without ADDS) becomes the input's gradient, `grad` the forward's output."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    at = row * num_columns + columns
    rstd = tl.load(inverse + row)
    low = grad.dtype.element_ty
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normal = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * rstd
    weighted = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
    shared = tl.sum(weighted * normal, axis=0) / num_columns
    result = rstd * (weighted - normal * shared)
    if ADDS:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + at, result.to(residual.dtype.element_ty), mask=inside)
    tl.store(grad + at, (normal.to(low).to(tl.float32) * factor).to(low), mask=inside)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = x_TD.shape
    out_TD = torch.empty(num_rows, num_columns, dtype=x_TD.dtype, device=x_TD.device)
    inverse_T = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    block = triton.next_power_of_2(num_columns)
    _forward[(num_rows,)](
        x_TD, weight_D, out_TD, inverse_T, x_TD.stride(0), num_columns, eps, BLOCK=block, num_warps=_warps(block)
    )
    return out_TD, inverse_T


def rms_norm_backward(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, inverse_T: Tensor, residual_TD: Tensor | None
) -> Tensor:
    num_rows, num_columns = x_TD.shape
    target_TD = torch.empty_like(x_TD) if residual_TD is None else residual_TD
    block = triton.next_power_of_2(num_columns)
    _backward[(num_rows,)](
        grad_TD,
        x_TD,
        weight_D,
        inverse_T,
        target_TD,
        num_columns,
        ADDS=residual_TD is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return target_TD


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))
