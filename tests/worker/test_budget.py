"""How much is judged: never more than its allowance, and always the same rows."""

from __future__ import annotations

import random

import pytest

from luthier.worker.budget import MOST_ROWS, SHARE_OF_TRAINING, JudgingBudget, choose_budget, spread_rows


def budget(**changes: object) -> JudgingBudget:
    given: dict[str, object] = {
        "num_held_out": 1000,
        "train_tokens": 100_000.0,
        "row_tokens": 50.0,
        "reply_tokens": 20.0,
        "num_models": 2,
        "rows": None,
        "generate_rows": None,
        "generates": True,
    }
    return choose_budget(**(given | changes))  # type: ignore[arg-type]


def test_by_hand() -> None:
    # 100,000 tokens of training cost 200,000 forwards of one token, half of which may go to judging. A row costs each
    # of two models 50 to score, and 50 + 2 x 20 to answer.
    assert budget() == JudgingBudget(num_rows=357, num_generated=357)
    assert budget(generates=False) == JudgingBudget(num_rows=MOST_ROWS, num_generated=0)
    assert budget(num_held_out=12) == JudgingBudget(12, 12)


def test_never_more_than_the_allowance() -> None:
    draw = random.Random(0)
    for _ in range(500):
        tokens, row, reply = draw.uniform(0, 1e6), draw.uniform(1, 3000), draw.uniform(1, 3000)
        models, generates = draw.randint(1, 3), draw.random() < 0.5
        chosen = budget(
            num_held_out=draw.randint(1, 5000),
            train_tokens=tokens,
            row_tokens=row,
            reply_tokens=reply,
            num_models=models,
            generates=generates,
        )
        cost = models * (chosen.num_rows * row + chosen.num_generated * (row + 2 * reply))
        assert cost <= SHARE_OF_TRAINING * 2 * tokens or chosen.num_rows == 1
        assert 1 <= chosen.num_rows <= MOST_ROWS
        assert chosen.num_generated == (chosen.num_rows if generates else 0)


@pytest.mark.parametrize(
    ("rows", "generate_rows", "expected"),
    [(900, None, (900, 900)), (900, 10, (900, 10)), (5, 10, (5, 5)), (2000, 0, (1000, 0)), (None, 3, (357, 3))],
)
def test_the_users_numbers_win(rows: int | None, generate_rows: int | None, expected: tuple[int, int]) -> None:
    assert budget(rows=rows, generate_rows=generate_rows) == JudgingBudget(*expected)


def test_rows_are_spread_the_same_way_every_time() -> None:
    chosen = spread_rows(100, 7, seed=3)
    assert chosen == spread_rows(100, 7, seed=3)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 7
    assert set(chosen) <= set(range(100))
    assert chosen != spread_rows(100, 7, seed=4)
    assert spread_rows(5, 9, seed=0) == list(range(5))


def test_no_part_of_the_data_is_left_out() -> None:
    counts = [0] * 20
    for seed in range(400):
        for row in spread_rows(20, 5, seed):
            counts[row] += 1
    assert min(counts) > 60  # 100 each on average, 9 a standard deviation
