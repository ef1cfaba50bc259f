"""SwiGLU, forward and backward.

Shapes: T rows, F features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(gate, up, out, gate_stride, up_stride, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gated = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    raised = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    result = gated * tl.sigmoid(gated) * raised
    tl.store(out + row * num_columns + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, gate, up, gate_stride, up_stride, num_columns, BLOCK: tl.constexpr):
    """`grad` becomes the forward's output, `gate` and `up` their own gradients."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    low = grad.dtype.element_ty
    gated = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    raised = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gated)
    active = gated * share
    tl.store(grad + row * num_columns + columns, (active * raised).to(low), mask=inside)
    tl.store(up + row * up_stride + columns, (given * active).to(low), mask=inside)
    slope = share * (1.0 + gated * (1.0 - share))
    tl.store(gate + row * gate_stride + columns, (given * raised * slope).to(low), mask=inside)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    num_rows, num_columns = gate_TF.shape
    out_TF = torch.empty(num_rows, num_columns, dtype=gate_TF.dtype, device=gate_TF.device)
    _forward[(num_rows, triton.cdiv(num_columns, BLOCK))](
        gate_TF, up_TF, out_TF, gate_TF.stride(0), up_TF.stride(0), num_columns, BLOCK=BLOCK, num_warps=4
    )
    return out_TF


def swiglu_backward(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> None:
    num_rows, num_columns = gate_TF.shape
    _backward[(num_rows, triton.cdiv(num_columns, BLOCK))](
        grad_TF, gate_TF, up_TF, gate_TF.stride(0), up_TF.stride(0), num_columns, BLOCK=BLOCK, num_warps=4
    )
