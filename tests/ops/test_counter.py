"""Dropout masks: fair, independent, and a function of their key alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.ops.counter import dropout_mask, mix, mix_number, token_keys

CPU = torch.device("cpu")
NUM_TOKENS, NUM_FEATURES = 300, 400


def keys(draw: tuple[int, int, int], length: int = NUM_TOKENS) -> Tensor:
    return token_keys([draw], [length], CPU)


def kept(probability: float = 0.5, draw: tuple[int, int, int] = (1, 0, 0), module: str = "layers.0.q_proj") -> Tensor:
    """bool [T, F]."""
    return dropout_mask(keys(draw), mix_number(*module.encode()), NUM_FEATURES, probability) > 0


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(probability: float) -> None:
    mask_TF = dropout_mask(keys((3, 1, 4)), 12345, NUM_FEATURES, probability)
    count = mask_TF.numel()
    deviation = (probability * (1 - probability) / count) ** 0.5
    assert float((mask_TF == 0).double().mean()) == pytest.approx(probability, abs=5 * deviation + 1e-9)
    torch.testing.assert_close(mask_TF.unique(), torch.tensor([0.0, 1 / (1 - probability)][probability == 0 :]))
    assert float(mask_TF.double().mean()) == pytest.approx(1.0, abs=5 * deviation / (1 - probability) + 1e-6)


def test_every_token_and_every_feature_has_its_share() -> None:
    share_TF = kept().double()
    # 6 standard deviations of a mean of 400 and of 300 fair draws
    assert float((share_TF.mean(dim=1) - 0.5).abs().max()) < 6 * 0.5 / NUM_FEATURES**0.5
    assert float((share_TF.mean(dim=0) - 0.5).abs().max()) < 6 * 0.5 / NUM_TOKENS**0.5


@pytest.mark.parametrize(
    "other",
    [
        {"module": "layers.0.k_proj"},
        {"module": "layers.1.q_proj"},
        {"draw": (2, 0, 0)},
        {"draw": (1, 1, 0)},
        {"draw": (1, 0, 1)},
        {"draw": (0, 1, 0)},  # the same numbers at other places
        {"draw": (1 + 2**32, 0, 0)},
    ],
    ids=str,
)
def test_masks_of_other_keys_are_independent(other: dict[str, object]) -> None:
    same = (kept() == kept(**other)).double()  # type: ignore[arg-type]
    assert float(same.mean()) == pytest.approx(0.5, abs=6 * 0.5 / same.numel() ** 0.5)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 1), (7, 0), (0, 16)])
def test_neighbours_within_a_mask_are_independent(shift: tuple[int, int]) -> None:
    mask_TF = kept()
    moved_TF = mask_TF.roll(shift, dims=(0, 1))
    same = (mask_TF == moved_TF).double().mean()
    assert float(same) == pytest.approx(0.5, abs=6 * 0.5 / mask_TF.numel() ** 0.5)


def test_company_and_order_do_not_change_a_sequences_keys() -> None:
    draws, lengths = [(7, 3, 5), (8, 3, 5), (7, 3, 6)], [5, 1, 9]
    alone = [keys(draw, length) for draw, length in zip(draws, lengths, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        together = token_keys([draws[i] for i in order], [lengths[i] for i in order], CPU)
        assert torch.equal(together, torch.cat([alone[i] for i in order]))


def test_a_longer_row_begins_as_a_shorter_one() -> None:
    assert torch.equal(keys((1, 2, 3), 20)[:7], keys((1, 2, 3), 7))  # so padding changes nothing
    wide, narrow = (dropout_mask(keys((1, 2, 3), 7), 5, width, 0.3) for width in (64, 16))
    assert torch.equal(wide[:, :16], narrow)


def test_mixing_stays_within_32_bits_and_loses_nothing() -> None:
    values = torch.cat([torch.arange(50_000), torch.arange(2**32 - 50_000, 2**32)])
    mixed = mix(values)
    assert int(mixed.min()) >= 0
    assert int(mixed.max()) < 2**32
    assert mixed.unique().numel() == values.numel()


def test_mix_number_tells_order_size_and_sign_apart() -> None:
    groups = [(1, 2), (2, 1), (1,), (2,), (1, 2, 0), (0, 1, 2), (2**32 + 1, 2), (-1, 2), (2**40, 0), (0, 2**40)]
    assert len({mix_number(*group) for group in groups}) == len(groups)
    assert all(0 <= mix_number(*group) < 2**32 for group in groups)
