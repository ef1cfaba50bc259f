"""Rounding rows to fp8 (e4m3), and the transpose of an fp8 matrix.

Shapes: T rows, K columns, O outputs, I inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64


@triton.jit
def _quantize(
    x, factors, values, scales, stride, num_columns, LARGEST: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    given = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        given = given * tl.load(factors + columns, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(given), axis=0), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    rounded = tl.minimum(tl.maximum(given / scale, -LARGEST), LARGEST)
    tl.store(values + row * num_columns + columns, rounded.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _transpose(source, target, num_rows, num_columns, TILE: tl.constexpr):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    tile = tl.load(source + rows[:, None] * num_columns + columns[None, :], mask=inside, other=0)
    tl.store(target + columns[:, None] * num_rows + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


def quantize_rows(x_TK: Tensor, factors_K: Tensor | None) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = x_TK.shape
    values_TK = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=x_TK.device)
    scales_T1 = torch.empty(num_rows, 1, dtype=torch.float32, device=x_TK.device)
    block = triton.next_power_of_2(num_columns)
    _quantize[(num_rows,)](
        x_TK, factors_K if factors_K is not None else scales_T1, values_TK, scales_T1, x_TK.stride(0), num_columns,
        LARGEST=448.0, SCALED=factors_K is not None, BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return values_TK, scales_T1


def transposed(values_OI: Tensor) -> Tensor:
    """A contiguous [I, O] of the same bytes."""
    num_rows, num_columns = values_OI.shape
    out_IO = torch.empty(num_columns, num_rows, dtype=values_OI.dtype, device=values_OI.device)
    _transpose[(triton.cdiv(num_rows, TILE), triton.cdiv(num_columns, TILE))](
        values_OI.view(torch.uint8), out_IO.view(torch.uint8), num_rows, num_columns, TILE=TILE, num_warps=4
    )
    return out_IO
