"""Which jobs share the next forward: a pure and fair choice within the budget."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from luthier.engine.planner import Offer, plan


def serve(sizes: dict[str, int], budget: int, rounds: int, shares: dict[str, float] | None = None) -> Counter[str]:
    """Tokens that each job is served in `rounds` forwards, each job always offering the same size."""
    served: Counter[str] = Counter(dict.fromkeys(sizes, 0))
    for _ in range(rounds):
        offers = [Offer(job, size, served[job], (shares or {}).get(job, 1.0)) for job, size in sizes.items()]
        for job in plan(offers, budget):
            served[job] += sizes[job]
    return served


def test_all_that_fit_run_together() -> None:
    offers = [Offer("b", 30, 0), Offer("a", 50, 0), Offer("c", 20, 0)]
    assert sorted(plan(offers, 100)) == ["a", "b", "c"]


def test_the_budget_holds_and_is_used() -> None:
    draw = random.Random(0)
    for _ in range(300):
        offers = [Offer(str(i), draw.randint(1, 80), draw.randint(0, 500)) for i in range(draw.randint(1, 9))]
        budget = draw.randint(1, 200)
        chosen = plan(offers, budget)
        sizes = {offer.job: offer.num_tokens for offer in offers}
        total = sum(sizes[job] for job in chosen)
        assert chosen
        assert len(set(chosen)) == len(chosen)
        assert total <= budget or len(chosen) == 1
        if total <= budget:
            assert all(size > budget - total for job, size in sizes.items() if job not in chosen)


def test_the_least_served_comes_whatever_its_size() -> None:
    assert plan([Offer("small", 1, 10), Offer("huge", 1000, 9)], 100) == ["huge"]


def test_it_is_a_pure_function_of_the_offers() -> None:
    offers = [Offer(str(i), 10 + i, i % 3) for i in range(8)]
    expected = plan(offers, 45)
    for seed in range(5):
        shuffled = random.Random(seed).sample(offers, len(offers))
        assert plan(shuffled, 45) == expected
    assert offers == [Offer(str(i), 10 + i, i % 3) for i in range(8)]


@pytest.mark.parametrize("budget", [1, 50, 120, 230, 400])
def test_jobs_that_always_have_work_get_equal_tokens(budget: int) -> None:
    sizes = {"a": 100, "b": 7, "c": 40, "d": 90}
    served, one_by_one = serve(sizes, budget, 2000), serve(sizes, 1, 2000)
    assert max(one_by_one.values()) - min(one_by_one.values()) <= 100
    # Company takes nothing from anybody: a job may get more by fitting in beside another, and none gets less.
    assert all(served[job] >= one_by_one[job] - 100 for job in sizes)
    if budget >= sum(sizes.values()):
        assert all(served[job] == 2000 * size for job, size in sizes.items())  # nobody is held back for fairness


def test_shares_divide_the_tokens() -> None:
    served = serve({"a": 50, "b": 50}, 60, 3000, {"a": 3.0, "b": 1.0})
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=0.02)


def test_none_is_starved_by_any_company() -> None:
    """However the others offer, the least served job is in the very next forward."""
    draw = random.Random(1)
    served = Counter({str(i): 0 for i in range(6)})
    waited: Counter[str] = Counter()
    for _ in range(3000):
        offers = [Offer(job, draw.choice([1, 5, 200]), served[job]) for job in served]
        chosen = plan(offers, 64)
        least = min(served.items(), key=lambda pair: (pair[1], pair[0]))[0]
        assert least in chosen
        for offer in offers:
            waited[offer.job] = 0 if offer.job in chosen else waited[offer.job] + 1
            served[offer.job] += offer.num_tokens * (offer.job in chosen)
            assert waited[offer.job] < 6 * 200


def test_a_lone_job_runs_whatever_the_budget() -> None:
    assert plan([Offer("a", 5000, 10**9)], 1) == ["a"]


def serve_groups(
    jobs: dict[str, tuple[str, int]], rounds: int, lead_tokens: float, weights: dict[str, float]
) -> Counter[str]:
    """Tokens that each group is served; `jobs` maps a job to its group and its micro-batch's tokens."""
    served: Counter[str] = Counter()
    of_group: Counter[str] = Counter(dict.fromkeys(weights, 0))
    for _ in range(rounds):
        offers = [
            Offer(
                job,
                size,
                served[job],
                group=group,
                num_group_tokens_served=of_group[group],
                group_share=weights[group],
            )
            for job, (group, size) in jobs.items()
        ]
        for job in plan(offers, 256, lead_tokens):
            group, size = jobs[job]
            served[job] += size
            of_group[group] += size
    return of_group


def test_a_group_of_many_jobs_gets_no_more_than_a_group_of_one() -> None:
    jobs = {f"a{n}": ("a", 40) for n in range(20)} | {"b": ("b", 70), "c": ("c", 15)}
    served = serve_groups(jobs, 600, 256.0, {"a": 1.0, "b": 1.0, "c": 1.0})
    jain = sum(served.values()) ** 2 / (len(served) * sum(value**2 for value in served.values()))
    assert jain > 0.99
    weighted = serve_groups(jobs, 600, 256.0, {"a": 1.0, "b": 2.0, "c": 1.0})
    assert weighted["b"] / weighted["a"] == pytest.approx(2.0, rel=0.1)


def test_within_a_group_jobs_take_turns() -> None:
    jobs = {f"a{n}": ("a", 40) for n in range(5)}
    served: Counter[str] = Counter()
    for _ in range(100):
        offers = [
            Offer(job, size, served[job], group=group, num_group_tokens_served=sum(served.values()))
            for job, (group, size) in jobs.items()
        ]
        for job in plan(offers, 80, 256.0):
            served[job] += 40
    assert max(served.values()) - min(served.values()) <= 40
