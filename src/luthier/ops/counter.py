"""Dropout masks from a counter: the same key gives the same mask on any device, in any company, again after a resume.

Shapes: T tokens, F features.

A mask entry is a hash of (job seed, optimizer step, example, token position, module, feature). The mixing function
has the shape of MurmurHash3's 32-bit finalizer (A. Appleby, public domain), with multipliers under 2^31, so that every
product stays exact in int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FIRST = 0x5BD1E995  # multipliers stay under 2^31, so that a 32-bit value times one fits int64
_SECOND = 0x7FEB352D


def mix(key: Tensor) -> Tensor:
    """Scramble int64 values in [0, 2^32) into int64 values in [0, 2^32)."""
    key = key ^ (key >> 16)
    key = (key * _FIRST) & _MASK
    key = key ^ (key >> 13)
    key = (key * _SECOND) & _MASK
    return key ^ (key >> 16)


def mix_number(*numbers: int) -> int:
    """One 32-bit key from several numbers, in order."""
    key = 0x9E3779B9
    for number in numbers:
        for part in (number & _MASK, (number >> 32) & _MASK):
            key ^= part
            key ^= key >> 16
            key = (key * _FIRST) & _MASK
            key ^= key >> 13
            key = (key * _SECOND) & _MASK
            key ^= key >> 16
    return key


def token_keys(draws: list[tuple[int, int, int]], lengths: list[int], device: torch.device) -> Tensor:
    """int64 [T]: a key for each token from its sequence's draw and its position within the sequence."""
    sequence_N = torch.tensor([mix_number(*draw) for draw in draws], dtype=torch.int64, device=device)
    lengths_N = torch.tensor(lengths, dtype=torch.int64, device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    return mix(sequence_N.repeat_interleave(lengths_N) ^ mix(positions_T))


def dropout_mask(token_keys_T: Tensor, module_key: int, num_features: int, probability: float) -> Tensor:
    """float32 [T, F]: 0 where dropped, 1 / (1 - probability) where kept."""
    features_F = mix(torch.arange(num_features, dtype=torch.int64, device=token_keys_T.device) ^ module_key)
    uniform_TF = mix(token_keys_T[:, None] ^ features_F[None, :])
    kept_TF = uniform_TF >= int(probability * 2**32)
    return kept_TF.to(torch.float32) / (1.0 - probability)
