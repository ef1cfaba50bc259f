"""The hold-out: by content, repeatable, equal rows on one side."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.split import duplicates, held_out, record_hash


def hashes_of(texts: list[str], seed: int = 0) -> np.ndarray:
    return np.array([record_hash(text, seed) for text in texts], dtype=np.uint64)


TEXTS = [f"row {number}" for number in range(200)]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.001, 1), (0.1, 20), (0.126, 25), (0.5, 100)])
def test_the_share_is_met(share: float, expected: int) -> None:
    assert held_out(hashes_of(TEXTS), share).sum() == expected


def test_the_choice_depends_on_content_and_seed_alone() -> None:
    chosen = held_out(hashes_of(TEXTS), 0.1)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = held_out(hashes_of([TEXTS[index] for index in order]), 0.1)
    assert (shuffled == chosen[order]).all()
    assert (held_out(hashes_of(TEXTS, seed=1), 0.1) != chosen).any()


def test_more_rows_move_few_of_the_others() -> None:
    before = held_out(hashes_of(TEXTS), 0.1)
    after = held_out(hashes_of([*TEXTS, "one more"]), 0.1)
    assert (before != after[:-1]).sum() <= 1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_equal_rows_stand_on_one_side(share: float) -> None:
    texts = [f"row {number % 40}" for number in range(200)]
    marked = held_out(hashes_of(texts), share)
    sides = {text: {bool(flag) for other, flag in zip(texts, marked, strict=True) if other == text} for text in texts}
    assert all(len(side) == 1 for side in sides.values())
    assert abs(marked.sum() - share * 200) <= 5


def test_something_is_left_to_train_on() -> None:
    assert held_out(hashes_of(["same"] * 10), 0.5).sum() == 0
    assert held_out(hashes_of(["one"]), 0.5).sum() == 0
    assert held_out(hashes_of([]), 0.5).sum() == 0
    assert held_out(hashes_of(["a", "b"]), 0.001).sum() == 1
    assert 0 < held_out(hashes_of(["a"] * 9 + ["b"]), 0.5).sum() < 10


def test_duplicates_mark_all_but_the_first() -> None:
    marked = duplicates(hashes_of(["a", "b", "a", "c", "b", "a"]))
    assert marked.tolist() == [False, False, True, False, True, True]
