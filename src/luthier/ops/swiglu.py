"""SwiGLU (Shazeer 2020, arXiv:2002.05202): silu(gate) * up.

Shapes: T rows, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.capability import runs_kernels


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """A fresh [T, F]; the inputs may be strided by row."""
    if runs_kernels(gate_TF):
        from luthier.ops.kernels import swiglu as kernels

        return kernels.swiglu(gate_TF, up_TF)
    return swiglu_reference(gate_TF, up_TF)


def swiglu_backward_(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> None:
    """In place: `grad_TF` becomes the forward's output, `gate_TF` and `up_TF` become their own gradients."""
    if runs_kernels(gate_TF):
        from luthier.ops.kernels import swiglu as kernels

        kernels.swiglu_backward(grad_TF, gate_TF, up_TF)
    else:
        swiglu_backward_reference_(grad_TF, gate_TF, up_TF)


def swiglu_reference(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return F.silu(gate_TF).mul_(up_TF)


def swiglu_backward_reference_(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> None:
    active_TF = F.silu(gate_TF)
    grad_up_TF, grad_active_TF = grad_TF * active_TF, grad_TF * up_TF
    torch.mul(active_TF, up_TF, out=grad_TF)
    gate_TF.copy_(torch.ops.aten.silu_backward(grad_active_TF, gate_TF))
    up_TF.copy_(grad_up_TF)
