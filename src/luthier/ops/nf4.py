"""A frozen linear layer whose weight is kept in NF4 with double quantization, by bitsandbytes.

Shapes: O outputs, I inputs, T rows. The weight's O x I values, flat, are cut into blocks of 64.

    w = code[q] * s_block,    s_block = code8[q8] * s_group + offset

q is a 4-bit index into the 16 quantiles of a normal distribution, s_block the block's largest magnitude; those scales
are themselves kept in 8 bits, in groups of 256. Dettmers et al. 2023, "QLoRA", arXiv:2305.14314. That is
0.5 + 1/64 + 4/(64 * 256) bytes a value, 0.258 of bfloat16's.

The dense weight exists only within a product: once in a layer's forward, once in its backward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops.fp8 import Fp8Weight

BLOCK = 64
"""Values that share a scale."""

STATE_BLOCK = 256
"""Scales that share a scale of their own."""

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What bitsandbytes dequantizes to. Any other type is reached through float32."""


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """A weight [O, I] in NF4.

    Attributes:
        packed: uint8, two indices a byte.
        state: bitsandbytes' `QuantState`: the scales, their own quantization, the codes and the shape.
        dtype: What products are computed in, unless their input says otherwise.
    """

    packed: Tensor
    state: Any
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.state.shape)

    @property
    def num_values(self) -> int:
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def num_bytes(self) -> int:
        """All that is resident, the scales and codes included."""
        nested = self.state.state2
        tensors = [self.packed, self.state.absmax, self.state.code, self.state.offset, nested.absmax, nested.code]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [O, I] as numbers, freshly made: `dequantize_4bit` of bitsandbytes.

        Args:
            dtype: None for the weight's own.
        """
        from bitsandbytes.functional import dequantize_4bit

        wanted = dtype or self.dtype
        made = wanted if wanted in COMPUTE_DTYPES else torch.float32
        state = copy.copy(self.state)
        state.dtype = made
        return dequantize_4bit(self.packed, state).to(wanted)


def quantize(weight_OI: Tensor, dtype: torch.dtype | None = None) -> Nf4Weight:
    """Round a weight to NF4 with double quantization, on the device where it lies.

    Args:
        dtype: What products are computed in; None for the weight's own type.
    """
    from bitsandbytes.functional import quantize_4bit

    given_OI = weight_OI.detach().contiguous()
    if given_OI.dtype not in COMPUTE_DTYPES:
        given_OI = given_OI.float()
    packed, state = quantize_4bit(given_OI, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return Nf4Weight(packed, state, dtype or weight_OI.dtype)


def num_bytes_of(num_values: int) -> int:
    """`Nf4Weight.num_bytes` of a weight of so many values: indices, scales in 8 bits, their scales, two codes."""
    num_scales = -(-num_values // BLOCK)
    return -(-num_values // 2) + num_scales + 4 * -(-num_scales // STATE_BLOCK) + 4 * (16 + 256 + 1)


FrozenWeight = Tensor | Nf4Weight | Fp8Weight


def dense_weight(weight_OI: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """The weight as numbers: a tensor as it is, NF4 and fp8 dequantized to `dtype`."""
    return weight_OI if isinstance(weight_OI, Tensor) else weight_OI.dense(dtype)


def nf4_forward(x: Tensor, weight: Nf4Weight, bias_O: Tensor | None) -> Tensor:
    """x W^T + b by bitsandbytes, which on CUDA reads the 4-bit weight directly where rows are few. The caller owns the
    backward.
    """
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x, weight.packed, weight.state, bias=bias_O)


def nf4_linear_reference(x: Tensor, weight: Nf4Weight, bias_O: Tensor | None = None) -> Tensor:
    """The definition: dequantize, then a plain product. What the products are held against."""
    return F.linear(x, weight.dense(x.dtype), bias_O)
