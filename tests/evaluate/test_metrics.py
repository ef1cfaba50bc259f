from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from luthier.evaluate.intervals import bootstrap, sign_test, wilson
from luthier.evaluate.metrics import BETTER, UNCLEAR, WORSE, RowScore, compare, evaluation, summarize
from luthier.types import NO_CLASS


def token_rows(nll_per_token: list[float], num_tokens: list[int]) -> list[RowScore]:
    return [
        RowScore(row=row, nll_sum=nll * count, weight_sum=float(count), num_correct_tokens=count // 2, num_tokens=count)
        for row, (nll, count) in enumerate(zip(nll_per_token, num_tokens, strict=True))
    ]


def exact_rows(right: list[bool]) -> list[RowScore]:
    return [RowScore(row=row, is_exact=is_right) for row, is_right in enumerate(right)]


@pytest.mark.parametrize(
    ("num_right", "num_rows", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I,
    # method 3; the last by the closed form at p = 0: z^2 / (n + z^2).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 1, 0.0, 0.7935),
    ],
)
def test_wilson_gives_the_published_intervals(num_right: int, num_rows: int, low: float, high: float) -> None:
    assert wilson(num_right / num_rows, num_rows) == pytest.approx((low, high), abs=5e-5)


def test_wilson_mirrors_and_refuses_no_rows() -> None:
    low, high = wilson(0.9, 30)
    assert wilson(0.1, 30) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError, match="at least one row"):
        wilson(0.5, 0)


def test_sign_test_is_the_exact_binomial_and_its_approximation_joins_it() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert sign_test(3, 3) == 1.0
    assert sign_test(0, 0) == 1.0
    assert sign_test(531, 469) == pytest.approx(sign_test(532, 470), abs=0.005)


def test_bootstrap_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    num_held, num_trials = 0, 200
    for trial in range(num_trials):
        values_N = generator.exponential(1.0, 80)
        low_K, high_K = bootstrap(lambda c_BN, v_N=values_N: (c_BN @ v_N / c_BN.sum(1))[:, None], 80, seed=trial)
        num_held += low_K[0] <= 1.0 <= high_K[0]
    assert 0.88 <= num_held / num_trials <= 0.99


def test_bootstrap_in_blocks_draws_every_row_equally_and_repeats() -> None:
    seen = []

    def total(counts_BN: np.ndarray) -> np.ndarray:
        seen.append(counts_BN)
        return counts_BN[:, :1]

    num_rows = 30_000  # more than one block
    first = bootstrap(total, num_rows, seed=3, num_resamples=100)
    assert len(seen) > 1
    counts_RN = np.concatenate(seen)
    assert counts_RN.shape == (100, num_rows)
    assert (counts_RN.sum(axis=1) == num_rows).all()
    assert abs(counts_RN.mean(axis=0) - 1.0).max() < 0.6  # six standard deviations of a mean of 100 Poisson counts
    assert np.array_equal(first, bootstrap(total, num_rows, seed=3, num_resamples=100))


def test_loss_is_weighted_by_tokens_and_perplexity_is_its_exponential() -> None:
    summary = summarize(token_rows([1.0, 3.0], [30, 10]))
    assert summary["loss"]["value"] == pytest.approx((30 + 30) / 40)
    for part in ("value", "low", "high"):
        assert summary["perplexity"][part] == pytest.approx(math.exp(summary["loss"][part]))
    assert summary["token_accuracy"]["value"] == pytest.approx(0.5)
    assert summary["loss"]["rows"] == 2
    assert summary["loss"]["low"] == pytest.approx(1.0)
    assert summary["loss"]["high"] == pytest.approx(3.0)
    assert "exact_match" not in summary
    assert "accuracy" not in summary


def test_exact_match_counts_only_rows_with_a_reply() -> None:
    scores = [*exact_rows([True, True, False, True]), RowScore(row=9, nll_sum=1.0, weight_sum=1.0, num_tokens=1)]
    exact = summarize(scores)["exact_match"]
    assert (exact["value"], exact["rows"]) == (0.75, 4)
    assert (exact["low"], exact["high"]) == pytest.approx(wilson(0.75, 4))


def test_macro_f1_by_hand() -> None:
    truth, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 3]
    scores = [
        RowScore(row=row, nll_sum=0.5, weight_sum=1.0, class_index=true, predicted_class=guess)
        for row, (true, guess) in enumerate(zip(truth, predicted, strict=True))
    ]
    summary = summarize(scores)
    assert summary["accuracy"]["value"] == pytest.approx(4 / 6)
    # Class 0: 4/5, class 1: 4/5, classes 2 and 3 (only true, only predicted): 0.
    assert summary["macro_f1"]["value"] == pytest.approx((4 / 5 + 4 / 5 + 0 + 0) / 4)
    assert summary["macro_f1"]["low"] <= summary["macro_f1"]["value"] <= summary["macro_f1"]["high"]
    assert summary["loss"]["value"] == pytest.approx(0.5)
    assert "perplexity" not in summary  # a head has no tokens
    headless = [RowScore(row=row, class_index=0, predicted_class=guess) for row, guess in enumerate([None, NO_CLASS])]
    assert summarize(headless) == {}


def test_turns_of_one_conversation_are_not_counted_as_independent() -> None:
    generator = np.random.default_rng(2)
    right = list(generator.random(40) < 0.5)
    once = exact_rows(right)
    copied = [score for score in once for _ in range(10)]
    assert summarize(copied)["exact_match"] == pytest.approx(summarize(once)["exact_match"])
    rows = token_rows(list(generator.random(40)), [8] * 40)
    assert summarize(rows * 10)["loss"] == pytest.approx(summarize(rows)["loss"])


def test_summaries_repeat_and_do_not_depend_on_the_order_of_rows() -> None:
    generator = np.random.default_rng(5)
    rows = token_rows(list(generator.random(50)), list(generator.integers(2, 30, 50)))
    assert summarize(rows) == summarize(rows[::-1])
    assert summarize(rows)["loss"]["low"] != summarize(rows, seed=1)["loss"]["low"]


def test_no_rows_no_scores() -> None:
    assert summarize([]) == {}
    assert compare([], exact_rows([True])) == {}
    assert compare([RowScore(row=1, is_exact=True)], [RowScore(row=2, is_exact=True)]) == {}


def test_compare_pairs_rows_whatever_their_order() -> None:
    generator = np.random.default_rng(1)
    hardness = generator.uniform(0.5, 4.0, 60)
    base, tuned = token_rows(list(hardness), [10] * 60), token_rows(list(hardness - 0.1), [10] * 60)
    change = compare(base, tuned[::-1])["loss"]
    assert change["difference"] == pytest.approx(-0.1)
    assert change["low"] == pytest.approx(-0.1)  # paired, the rows' hardness cancels
    assert change["verdict"] == BETTER
    assert compare(tuned, base)["loss"]["verdict"] == WORSE
    assert compare(base, tuned)["token_accuracy"]["verdict"] == UNCLEAR


def test_compare_uses_only_rows_both_models_replied_to() -> None:
    base = [RowScore(row=row, is_exact=False if row < 10 else None) for row in range(20)]
    tuned = [RowScore(row=row, is_exact=row < 5) for row in range(20)]
    change = compare(base, tuned)["exact_match"]
    assert change["difference"] == pytest.approx(0.5)
    assert change["rows"] == 10


@pytest.mark.parametrize(
    ("num_rows", "num_won", "num_lost", "verdict"),
    [
        (96, 84, 0, BETTER),
        (96, 0, 84, WORSE),
        (96, 20, 18, UNCLEAR),
        (96, 5, 0, UNCLEAR),
        (96, 6, 0, BETTER),
        (5, 5, 0, UNCLEAR),
    ],
)
def test_a_verdict_needs_evidence(num_rows: int, num_won: int, num_lost: int, verdict: str) -> None:
    base = exact_rows([num_won <= row < num_won + num_lost for row in range(num_rows)])
    tuned = exact_rows([row < num_won for row in range(num_rows)])
    assert compare(base, tuned)["exact_match"]["verdict"] == verdict


def test_a_loss_that_is_no_number_is_worse_and_still_valid_json() -> None:
    base, tuned = token_rows([1.0] * 10, [4] * 10), token_rows([1.0] * 9 + [math.nan], [4] * 10)
    result = evaluation({"base": base, "tuned": tuned})
    json.dumps(result, allow_nan=False)
    assert result["tuned"]["loss"]["value"] is None
    assert result["comparison"]["loss"]["verdict"] == WORSE
    assert compare(tuned, base)["loss"]["verdict"] == BETTER
    assert result["tuned"]["token_accuracy"]["value"] == pytest.approx(0.5)
    huge = summarize(token_rows([5000.0] * 10, [4] * 10))
    assert huge["perplexity"]["value"] is None
    assert huge["loss"]["value"] == pytest.approx(5000.0)


def test_evaluation_scores_every_model_and_group() -> None:
    base, tuned = exact_rows([False] * 8), exact_rows([True] * 8)
    base = [RowScore(row=s.row, is_exact=s.is_exact, group="even" if s.row % 2 == 0 else "odd") for s in base]
    result = evaluation({"base": base, "base_3_shot": tuned, "tuned": tuned})
    assert result["num_rows"] == 8
    assert result["base_3_shot"]["exact_match"]["value"] == 1.0
    assert result["comparison"]["exact_match"]["verdict"] == BETTER
    assert result["groups"]["even"]["base"]["exact_match"]["rows"] == 4
    assert "groups" not in evaluation({"base": tuned, "tuned": tuned})


def test_judging_needs_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, luthier.evaluate.report, luthier.evaluate.card\n"
        "print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
