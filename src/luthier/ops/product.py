"""The two products with a frozen weight, x W^T and g W, by the fastest kernel that this machine has for them.

Shapes: M rows, K inputs, N outputs.

A weight in NF4 is dequantized for the product and let go at once, so each of the two products does it anew: a step
holds one dense layer at a time, and pays for it as if it had some fifty rows more (docs/methods/qlora.md).

MKL gives AMD processors its AVX2 kernels even where AVX-512 is there; oneDNN does not, and runs these float32 products
1.05 to 1.4 times faster on such a machine. The choice depends on the processor alone, never on a timing, so that a
resumed run computes the same bytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.fp8 import Fp8Weight, fp8_backward, fp8_forward
from luthier.ops.nf4 import COMPUTE_DTYPES, FrozenWeight, Nf4Weight, nf4_forward


def frozen_product(x: Tensor, weight_NK: FrozenWeight, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b over the last dimension of x, differentiable with respect to x and keeping nothing but the weight."""
    return _FrozenProduct.apply(x, weight_NK, bias_N)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: FrozenWeight, bias_N: Tensor | None) -> Tensor:
        ctx.weight_NK = weight_NK
        return forward_product(x, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (backward_product(grads[0], ctx.weight_NK) if ctx.needs_input_grad[0] else None), None, None


def forward_product(x_MK: Tensor, weight_NK: FrozenWeight, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b, [M, N]."""
    if isinstance(weight_NK, Nf4Weight):
        if x_MK.is_cuda and x_MK.dtype in COMPUTE_DTYPES:
            return nf4_forward(x_MK, weight_NK, bias_N)
        weight_NK = weight_NK.dense(x_MK.dtype)
    if isinstance(weight_NK, Fp8Weight):
        return fp8_forward(x_MK, weight_NK, bias_N)
    if _onednn_serves(x_MK, weight_NK):
        return torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias_N, "none", [], "")
    return F.linear(x_MK, weight_NK, bias_N)


def backward_product(grad_MN: Tensor, weight_NK: FrozenWeight) -> Tensor:
    """g W, [M, K]: the gradient with respect to the input."""
    if isinstance(weight_NK, Nf4Weight):
        weight_NK = weight_NK.dense(grad_MN.dtype)
    if isinstance(weight_NK, Fp8Weight):
        return fp8_backward(grad_MN, weight_NK)
    if _onednn_serves(grad_MN, weight_NK):
        return torch.ops.mkldnn._linear_pointwise(grad_MN, weight_NK.t(), None, "none", [], "")
    return grad_MN @ weight_NK


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and weight.dtype == torch.float32 and x.device.type == "cpu" and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
