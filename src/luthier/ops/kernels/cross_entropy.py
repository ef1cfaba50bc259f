"""Cross-entropy of a chunk of logits, and its gradient in their place; one program a row.

Shapes: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _cross_entropy(
    logits, targets, nll, is_correct, stride, num_columns, WRITES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    target = tl.load(targets + row)
    picked = tl.load(line + target).to(tl.float32)
    best = -float("inf")
    total = 0.0
    earlier = 0  # columns before the target that are as large: the first of equals is the likeliest
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(line + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(best, tl.max(values, axis=0))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(values - higher), axis=0)
        best = higher
        earlier += tl.sum(((values == picked) & (columns < target)).to(tl.int32), axis=0)
    tl.store(nll + row, best + tl.log(total) - picked)
    tl.store(is_correct + row, (picked >= best) & (earlier == 0))
    if WRITES:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_columns
            values = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(values - best) / total
            grad = tl.where(columns == target, grad - 1.0, grad)
            tl.store(line + columns, grad.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(logits_CV: Tensor, targets_C: Tensor, nll_C: Tensor, is_correct_C: Tensor, writes: bool) -> None:
    """Fill `nll_C` (float32) and `is_correct_C` (bool); with `writes`, the logits become softmax - onehot."""
    num_rows, num_columns = logits_CV.shape
    if num_rows == 0:
        return
    _cross_entropy[(num_rows,)](
        logits_CV, targets_C, nll_C, is_correct_C, logits_CV.stride(0), num_columns,
        WRITES=writes, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
