"""Rotary embedding of query and key heads; one program a token and a block of heads.

Shapes: T tokens, H heads, D head size, E rotated features (E <= D).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    source, target, cosine, sine, source_stride, target_stride, table_stride, num_heads, sign,
    SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, COPIES: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    features = tl.arange(0, BLOCK)
    inside = (heads[:, None] < num_heads) & (features[None, :] < HALF)
    at = heads[:, None] * SIZE + features[None, :]
    cos = tl.load(cosine + token * table_stride + features, mask=features < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sine + token * table_stride + features, mask=features < HALF, other=0.0).to(tl.float32)[None, :]
    sin = sin * sign
    first = tl.load(source + token * source_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + token * source_stride + at + HALF, mask=inside, other=0.0).to(tl.float32)
    low = target.dtype.element_ty
    tl.store(target + token * target_stride + at, (first * cos - second * sin).to(low), mask=inside)
    tl.store(target + token * target_stride + at + HALF, (second * cos + first * sin).to(low), mask=inside)
    if COPIES:
        rest = tl.arange(0, REST)
        kept = (heads[:, None] < num_heads) & (rest[None, :] < SIZE - 2 * HALF)
        beyond = heads[:, None] * SIZE + 2 * HALF + rest[None, :]
        tl.store(
            target + token * target_stride + beyond,
            tl.load(source + token * source_stride + beyond, mask=kept, other=0.0),
            mask=kept,
        )


@triton.jit
def _copy(source, target, source_stride, target_stride, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(source + row * source_stride + columns, mask=columns < num_columns)
        tl.store(target + row * target_stride + columns, values, mask=columns < num_columns)


def copy(source_THD: Tensor, target_THD: Tensor) -> None:
    num_tokens, num_heads, size = source_THD.shape
    _check_heads(source_THD, target_THD)
    strides = source_THD.stride(0), target_THD.stride(0)
    _copy[(num_tokens,)](source_THD, target_THD, *strides, num_heads * size, BLOCK=1024, num_warps=4)


def _check_heads(*parts: Tensor) -> None:
    for heads in parts:
        if heads.stride()[1:] != (heads.shape[-1], 1):
            raise ValueError(f"the heads of a token must stand next to one another, not at strides {heads.stride()}")


def rotate(source_THD: Tensor, target_THD: Tensor, cos_TE: Tensor, sin_TE: Tensor, sign: float) -> None:
    num_tokens, num_heads, size = source_THD.shape
    _check_heads(source_THD, target_THD)
    half = cos_TE.shape[-1] // 2
    copies = source_THD.data_ptr() != target_THD.data_ptr() and size > 2 * half
    block = triton.next_power_of_2(half)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, 2048 // block))
    _rotate[(num_tokens, triton.cdiv(num_heads, block_heads))](
        source_THD,
        target_THD,
        cos_TE,
        sin_TE,
        source_THD.stride(0),
        target_THD.stride(0),
        cos_TE.stride(0),
        num_heads,
        sign,
        SIZE=size,
        HALF=half,
        BLOCK=block,
        HEADS=block_heads,
        COPIES=copies,
        REST=triton.next_power_of_2(max(1, size - 2 * half)),
        num_warps=4,
    )
