"""Attention over packed sequences, registered with transformers under a name of its own.

Shapes: H query heads, K key heads, T tokens of all sequences, D head size, N sequences, L positions of a cache.

transformers hands every attention the keyword arguments of the model's forward. The ones used here carry its own names
for flattened batches (`cu_seq_lens_q`, `max_length_q`); an argument that changes attention and is not understood here
raises, so that a model with soft-capping or sinks fails its probe instead of training on wrong scores.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.ops.cpu_attention import CpuAttention, layout_of, serves

PACKED_ATTENTION = "luthier_packed"

# Arguments that transformers passes along and that change nothing here.
_INERT = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "logits_to_keep",
        "deterministic",
        "position_embeddings",
        "output_router_logits",
        "past_key_values",
        "is_causal",
        "cu_seq_lens_k",
        "max_length_k",
        "num_items_in_batch",
    }
)


class KeyValueCache(Protocol):
    """What the sampler lends to attention: it stores new keys and values and attends over the old ones too."""

    def attend(
        self, layer: int, query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Store the T new keys and values of `layer`, and return the attention output [1, H, T, D]."""
        ...


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    luthier_cache: KeyValueCache | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in which every packed sequence sees itself alone.

    Args:
        query_1HTD, key_1KTD, value_1KTD: The flat batch after rotary embedding; K divides H.
        attention_mask: Must be None: the mask follows from the sequence bounds.
        cu_seq_lens_q: int32 [N + 1], token offsets of the sequences.
        max_length_q: Tokens in the longest sequence.
        sliding_window: A token sees itself and at most `sliding_window - 1` tokens before it.
        luthier_cache: While sampling, the cache that attends instead.

    Returns:
        The output [1, T, H, D] and None for the weights.

    Raises:
        ValueError: for an argument that would change the scores and is not understood.
    """
    unknown = [name for name, value in others.items() if value is not None and name not in _INERT]
    if unknown or attention_mask is not None or dropout:
        given = unknown + ["attention_mask"] * (attention_mask is not None) + ["dropout"] * bool(dropout)
        raise ValueError(f"packed attention does not understand {', '.join(given)}")
    scale = scaling if scaling is not None else query_1HTD.shape[-1] ** -0.5
    is_causal = others.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if luthier_cache is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        out_1HTD = luthier_cache.attend(layer, query_1HTD, key_1KTD, value_1KTD, scale, sliding_window)
    elif cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed attention needs cu_seq_lens_q and max_length_q")
    elif query_1HTD.is_cuda and query_1HTD.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query_1HTD, key_1KTD, value_1KTD, cu_seq_lens_q, max_length_q, scale, is_causal, sliding_window)
    else:
        offsets = cu_seq_lens_q.tolist()
        lengths = tuple(end - start for start, end in pairwise(offsets))
        if is_causal and serves(query_1HTD, lengths, sliding_window):
            parts = [part[0].transpose(0, 1) for part in (query_1HTD, key_1KTD, value_1KTD)]
            layout = layout_of(lengths, parts[0].shape[1], parts[1].shape[1])
            out_THD = CpuAttention.apply(*parts, layout, scale, sliding_window)  # type: ignore[no-untyped-call]
            return out_THD[None], None
        out_1HTD = _per_sequence(query_1HTD, key_1KTD, value_1KTD, offsets, scale, is_causal, sliding_window)
    return out_1HTD.transpose(1, 2), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if window is None or window >= longest else window - 1
    # torch reads (-1, 0) as causal without a window.
    bounds = (before, 0) if causal else (before, before)
    if key.shape[1] != query.shape[1]:
        # torch 2.11's kernel wants as many key heads as query heads; later ones group them by themselves.
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    q_THD, k_THD, v_THD = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    out_THD = varlen_attn(q_THD, k_THD, v_THD, offsets, offsets, longest, longest, scale=scale, window_size=bounds)
    assert isinstance(out_THD, Tensor)
    return out_THD[None], None


def _per_sequence(
    query: Tensor, key: Tensor, value: Tensor, offsets: list[int], scale: float, causal: bool, window: int | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    lengths = [end - start for start, end in pairwise(offsets)]
    outputs = []
    # split, not slices: the backward of a split is one concatenation, that of a slice writes the whole tensor.
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = window_mask(length, window, causal, q.device) if window is not None and window < length else None
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """bool [length, length], true where the row's token sees the column's: within `window`, and not ahead if causal."""
    rows = torch.arange(length, device=device)
    distance = rows[:, None] - rows[None, :]
    near = distance < window
    return near & (distance >= 0) if causal else near & (distance > -window)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
