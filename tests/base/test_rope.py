"""LongRoPE per sequence: each gets the factors that it would get alone.

Shapes: L positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ORIGINAL_MAX_POSITIONS, write_tiny_phi3
from torch import Tensor

from luthier.base.load import load_base
from luthier.base.rope import PerSequenceRotary, longrope_short_positions, wrap_longrope

LIMIT = ORIGINAL_MAX_POSITIONS


@pytest.fixture
def rotary(tiny_phi3: Path) -> PerSequenceRotary:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_phi3)
    [wrapped] = wrap_longrope(model)
    return wrapped


def alone(rotary: PerSequenceRotary, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of one sequence, by transformers' own choice."""
    cos, sin = rotary.rotary(torch.zeros(1), torch.arange(length)[None])
    return cos[0].clone(), sin[0].clone()


@pytest.mark.parametrize("lengths", [[LIMIT], [LIMIT + 1], [5, LIMIT, LIMIT + 1, 3], [100, 40], [1, 2], [128, 1]])
def test_each_sequence_gets_its_own_factors(rotary: PerSequenceRotary, lengths: list[int]) -> None:
    expected = [alone(rotary, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    rotary.is_long_BL = torch.cat([torch.full((length,), length > LIMIT) for length in lengths])[None]
    cos, sin = rotary(torch.zeros(1), positions)
    assert torch.equal(cos[0], torch.cat([pair[0] for pair in expected]))
    assert torch.equal(sin[0], torch.cat([pair[1] for pair in expected]))


def test_padded_rows(rotary: PerSequenceRotary) -> None:
    """A short row is padded past the limit without its factors changing."""
    lengths, longest = [7, 60], 60
    expected = [alone(rotary, length) for length in lengths]
    rotary.is_long_BL = torch.tensor([[False], [True]]).expand(2, longest)
    cos, _ = rotary(torch.zeros(1), torch.arange(longest).expand(2, -1))
    for row, length in enumerate(lengths):
        assert torch.equal(cos[row, :length], expected[row][0])


def test_the_two_classes_differ(rotary: PerSequenceRotary) -> None:
    assert not torch.allclose(alone(rotary, LIMIT)[0][:5], alone(rotary, LIMIT + 1)[0][:5], atol=1e-3)


def test_only_longrope_is_wrapped(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)
    assert base.longrope_limit is None
    assert not any(isinstance(module, PerSequenceRotary) for module in base.model.modules())


def test_the_limit_is_read_from_the_config(tiny_phi3: Path, tmp_path: Path) -> None:
    base = load_base(tiny_phi3)
    assert base.longrope_limit == longrope_short_positions(base.config) == LIMIT
    other: Any = load_base(write_tiny_phi3(tmp_path / "other", original_max_position_embeddings=48))
    assert other.longrope_limit == 48
