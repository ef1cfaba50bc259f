"""Causal attention over packed sequences as a forward and a backward without autograd.

Shapes: T tokens of all sequences, H query heads, K key heads, D head size, N sequences.

On a GPU in bfloat16 or float16 both are one kernel over all sequences: cuDNN's where all are of one length and no
window cuts them (its plans are built per shape, so ragged batches do not go there), else FlashAttention-2 (Dao 2023,
arXiv:2307.08691). On a CPU `cpu_attention` serves; else scaled_dot_product_attention runs per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.ops import cpu_attention

MIN_CUDNN_TOKENS = 256
"""Shorter sequences gain nothing from cuDNN's kernel."""


@dataclass(frozen=True)
class Sequences:
    """How the flat batch is cut.

    Attributes:
        lengths: Tokens of each sequence.
        offsets_N1: int32, their bounds, on the device; of no meaning with `members`.
        longest: Most tokens of one, or more.
        is_even: Whether all have `longest` tokens, as cuDNN's kernel needs.
        members: Which rows each has, where some have rows in common (on a CPU alone); None where they stand one after
            another.
    """

    lengths: tuple[int, ...]
    offsets_N1: Tensor
    longest: int
    is_even: bool = field(default=False)
    members: tuple[cpu_attention.Member, ...] | None = field(default=None)
    _layouts: dict[tuple[int, int], cpu_attention.Layout] = field(default_factory=dict, init=False, repr=False)

    def cpu_layout(self, num_heads: int, num_keys: int) -> cpu_attention.Layout:
        """How `cpu_attention` runs them; made once for all layers."""
        if self.members is None:
            return cpu_attention.layout_of(self.lengths, num_heads, num_keys)
        key = num_heads, num_keys
        if key not in self._layouts:
            self._layouts[key] = cpu_attention.make_layout(self.members, *key)
        return self._layouts[key]


def attend(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, sequences: Sequences, scale: float, window: int | None
) -> tuple[Tensor, tuple[Any, ...]]:
    """The output [T, H, D], contiguous, and what the backward needs besides inputs and output."""
    if not (query_THD.is_cuda and query_THD.dtype in (torch.bfloat16, torch.float16)):
        if cpu_attention.serves(query_THD, sequences.lengths, window):
            layout = sequences.cpu_layout(query_THD.shape[1], key_TKD.shape[1])
            return cpu_attention.attend_on_cpu(query_THD, key_TKD, value_TKD, layout, scale, window)
        return _plain(query_THD, key_TKD, value_TKD, sequences, scale, window), ()
    if _takes_cudnn(query_THD, key_TKD, sequences, window):
        out, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            torch.ops.aten._scaled_dot_product_cudnn_attention(
                *(_even(part, sequences) for part in (query_THD, key_TKD, value_TKD)),
                None, True, 0.0, True, False, scale=scale,
            )
        )  # fmt: skip
        out_THD = out.transpose(1, 2).reshape(query_THD.shape)
        return out_THD, (logsumexp, seed, offset, cum_q, cum_k, max_q, max_k)
    before = -1 if window is None or window >= sequences.longest else window - 1
    out_THD, logsumexp, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query_THD, key_TKD, value_TKD, sequences.offsets_N1, sequences.offsets_N1, sequences.longest,
        sequences.longest, 0.0, True, False, scale=scale, window_size_left=before, window_size_right=0,
    )  # fmt: skip
    return out_THD, (logsumexp, state, unused)


def attend_backward(
    grad_THD: Tensor, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, out_THD: Tensor, saved: tuple[Any, ...],
    sequences: Sequences, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, each [T, heads, D] and contiguous."""
    if cpu_attention.serves(query_THD, sequences.lengths, window):
        layout = sequences.cpu_layout(query_THD.shape[1], key_TKD.shape[1])
        return cpu_attention.attend_on_cpu_backward(
            grad_THD, query_THD, key_TKD, value_TKD, out_THD, saved, layout, scale, window
        )
    if not saved:
        return _plain_backward(grad_THD, query_THD, key_TKD, value_TKD, sequences, scale, window)
    if len(saved) == 7:
        logsumexp, seed, offset, cum_q, cum_k, max_q, max_k = saved
        parts = (grad_THD, query_THD, key_TKD, value_TKD, out_THD)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_even(part, sequences) for part in parts),
            logsumexp, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True, scale=scale,
        )  # fmt: skip
        shapes = query_THD.shape, key_TKD.shape, value_TKD.shape
        dq, dk, dv = (grad.transpose(1, 2).reshape(shape) for grad, shape in zip(grads, shapes, strict=True))
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    logsumexp, state, unused = saved
    before = -1 if window is None or window >= sequences.longest else window - 1
    return torch.ops.aten._flash_attention_backward(
        grad_THD, query_THD, key_TKD, value_TKD, out_THD, logsumexp, sequences.offsets_N1, sequences.offsets_N1,
        sequences.longest, sequences.longest, 0.0, True, state, unused, scale=scale, window_size_left=before,
        window_size_right=0,
    )  # fmt: skip


def _takes_cudnn(query_THD: Tensor, key_TKD: Tensor, sequences: Sequences, window: int | None) -> bool:
    if not sequences.is_even or sequences.longest < MIN_CUDNN_TOKENS or not torch.backends.cudnn.is_available():
        return False
    cut = window is not None and window < sequences.longest
    return not cut and query_THD.shape[1] == key_TKD.shape[1] and torch.cuda.get_device_capability() >= (9, 0)


def _even(part_THD: Tensor, sequences: Sequences) -> Tensor:
    """A view [N, H, length, D]."""
    num_sequences = part_THD.shape[0] // sequences.longest
    return part_THD.unflatten(0, (num_sequences, sequences.longest)).transpose(1, 2)


def _plain(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, window: int | None) -> Tensor:
    from luthier.base.attention import window_mask

    bounds = [0]
    for length in sequences.lengths:
        bounds.append(bounds[-1] + length)
    outputs = []
    for start, end in pairwise(bounds):
        q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        length = end - start
        mask = window_mask(length, window, True, q.device) if window is not None and window < length else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        parts = [part.detach().requires_grad_() for part in (query, key, value)]
        out = _plain(parts[0], parts[1], parts[2], sequences, scale, window)
        dq, dk, dv = torch.autograd.grad(out, parts, grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
