"""A job's batches follow from its own seed and settings; what goes wrong ends it with a reason, and no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.conftest import PREFERENCE, add_job, run_all
from luthier.base.load import Base, load_base
from luthier.engine.engine import Engine
from luthier.engine.job import LossWatch, TrainingJob, loss_weight, split_by_tokens, total_steps
from luthier.engine.pack import PackItem
from luthier.engine.scoring import score_examples
from luthier.engine.step import SlotReport
from luthier.types import NO_CLASS, AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]


@pytest.fixture
def llama(tiny_llama: object) -> Base:
    return load_base(tiny_llama, dtype="float64")  # type: ignore[arg-type]


def make_job(base: Base, examples: list[Example], **train: object) -> TrainingJob:
    spec = TrainSpec(**({"batch_size": 4, "learning_rate": 1e-2} | train))  # type: ignore[arg-type]
    return TrainingJob("job", base.bank.add(AdapterSpec(rank=2), 0), examples, spec)


# -- which examples


@pytest.mark.parametrize(("num", "batch_size"), [(1, 4), (7, 1), (8, 4), (11, 4), (3, 50)])
def test_every_example_comes_once_an_epoch(llama: Base, make_examples: MakeExamples, num: int, batch_size: int) -> None:
    job = make_job(llama, make_examples(num, 0), batch_size=batch_size, epochs=3)
    orders = []
    for epoch in range(3):
        first = epoch * job.steps_per_epoch
        batches = [job.batch_indices(step) for step in range(first, first + job.steps_per_epoch)]
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        orders.append(np.concatenate(batches).tolist())
        assert sorted(orders[-1]) == list(range(num))
    assert job.total_steps == 3 * job.steps_per_epoch
    if num >= 7:
        assert orders[0] != orders[1] != orders[2]


def test_batches_follow_from_the_seed_alone(llama: Base, make_examples: MakeExamples) -> None:
    examples = make_examples(20, 0)
    one, same, other = (make_job(llama, examples, seed=seed) for seed in (5, 5, 6))
    order = [one.batch_indices(step).tolist() for step in range(10)]
    assert [same.batch_indices(step).tolist() for step in reversed(range(10))][::-1] == order
    assert [other.batch_indices(step).tolist() for step in range(10)] != order


@pytest.mark.parametrize(
    ("train", "expected"),
    [({"epochs": 2}, 6), ({"epochs": 0.5}, 2), ({"epochs": 1.1}, 4), ({"max_steps": 4}, 4), ({"max_steps": 400}, 6)],
)
def test_total_steps(train: dict[str, float], expected: int) -> None:
    assert total_steps(11, TrainSpec(batch_size=4, **train)) == expected  # type: ignore[arg-type]


# -- where they are cut


def test_parts_keep_order_and_bound() -> None:
    def items(*lengths: int) -> list[PackItem]:
        return [PackItem(Example(np.zeros(n, np.int32), np.zeros(n, np.float32)), 0) for n in lengths]

    def cut(given: list[PackItem], most: int) -> list[list[int]]:
        return [[item.example.num_tokens for item in part] for part in split_by_tokens(given, most)]

    assert cut(items(3, 4, 5, 6), 9) == [[3, 4], [5], [6]]
    assert cut(items(3, 4, 5, 6), 100) == [[3, 4, 5, 6]]
    assert cut(items(20, 1, 1, 20), 9) == [[20], [1, 1], [20]]
    assert cut(items(5, 5), 10) == [[5, 5]]
    assert cut(items(2, 2, 2), 1) == [[2], [2], [2]]


def test_the_cuts_do_not_depend_on_company(tiny_llama: object, make_examples: MakeExamples) -> None:
    def micro_batches(others: list[int]) -> list[list[int]]:
        engine = Engine(load_base(tiny_llama, dtype="float64"), budget_tokens=150)  # type: ignore[arg-type]
        for kind in others:
            add_job(engine, kind, make_examples)
        job = add_job(engine, 2, make_examples)
        seen: list[list[int]] = []
        accumulate = job.accumulate

        def noting(report: SlotReport, seconds: float) -> None:
            seen.append([item.example.row for item in job.next_micro_batch()])
            accumulate(report, seconds)

        job.accumulate = noting  # type: ignore[method-assign]
        run_all(engine)
        return seen

    alone = micro_batches([])
    assert alone == micro_batches([0, 1]) == micro_batches([3])
    assert len(alone) > 8
    assert sorted(row for part in alone for row in part) == sorted([*range(11), *range(11)])


def test_report_counts(llama: Base, make_examples: MakeExamples) -> None:
    examples = make_examples(10, 0)
    engine = Engine(llama)
    job = make_job(llama, examples, micro_batch_tokens=50)
    engine.add(job)
    reports = run_all(engine)["job"]
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [report.epoch for report in reports] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for report in reports:
        batch = [examples[i] for i in job.batch_indices(report.step - 1)]
        assert report.num_tokens == sum(example.num_tokens for example in batch)
        assert report.num_supervised_tokens == sum(int((example.weights[1:] > 0).sum()) for example in batch)
        assert report.learning_rate > 0
        assert report.seconds > 0
    assert job.num_tokens_done == 2 * sum(example.num_tokens for example in examples)
    assert job.state == "done"


# -- weights


def test_fractional_weights_weigh_in_the_mean(llama: Base, make_examples: MakeExamples) -> None:
    """Twice every weight is the same training; other proportions are another one."""
    examples = make_examples(4, 0)
    for example in examples:
        example.weights[1:] = np.linspace(0.0, 1.5, example.num_tokens)[1:].astype(np.float32)

    def curve(chosen: list[Example]) -> list[float]:
        engine = Engine(llama)
        engine.add(make_job(llama, chosen))
        return [report.loss for report in run_all(engine)["job"]]

    doubled = [replace(example, weights=example.weights * 2) for example in examples]
    flat = [replace(example, weights=np.minimum(example.weights, 1)) for example in examples]
    assert curve(examples) == pytest.approx(curve(doubled), rel=1e-9)
    assert curve(examples) != pytest.approx(curve(flat), rel=1e-3)


def test_a_row_without_loss_changes_nothing(llama: Base, make_examples: MakeExamples) -> None:
    """Even where it is a micro-batch of its own."""
    examples = make_examples(3, 0)
    silent = Example(np.arange(4, 40, dtype=np.int32), np.zeros(36, np.float32))

    def curve(chosen: list[Example], micro_batch_tokens: int) -> list[float]:
        engine = Engine(llama)
        engine.add(make_job(llama, chosen, micro_batch_tokens=micro_batch_tokens))
        return [report.loss for report in run_all(engine)["job"]]

    expected = curve(examples, 4096)
    assert curve([*examples, silent], 4096) == pytest.approx(expected, rel=1e-9)
    assert curve([*examples, silent], 8) == pytest.approx(expected, rel=1e-9)


def test_a_batch_without_any_loss_ends_its_job_and_no_other(llama: Base, make_examples: MakeExamples) -> None:
    silent = [Example(np.arange(4, 9, dtype=np.int32), np.zeros(5, np.float32))] * 4
    engine = Engine(llama)
    other = add_job(engine, 0, make_examples)
    job = make_job(llama, silent)
    engine.add(job)
    run_all(engine)
    assert job.state == "failed"
    assert "step 1 carries loss" in job.problem
    assert other.state == "done"


def test_loss_weight() -> None:
    tokens = np.arange(3, dtype=np.int32)
    assert loss_weight(Example(tokens, np.array([9, 0.5, 2], np.float32))) == 2.5  # nothing predicts the first token
    assert loss_weight(Example(tokens, np.zeros(3, np.float32), class_index=0)) == 1
    tags = np.array([NO_CLASS, 0, 4], np.int32)
    assert loss_weight(Example(tokens, np.zeros(3, np.float32), tags=tags)) == 2


# -- trouble


def test_a_loss_that_is_no_number_ends_its_job_and_no_other(llama: Base, make_examples: MakeExamples) -> None:
    alone = Engine(llama)
    expected = [report.loss for report in _run_one(alone, add_job(alone, 1, make_examples))]
    engine = Engine(llama)
    healthy, broken = add_job(engine, 1, make_examples), make_job(llama, make_examples(8, 0))
    engine.add(broken)
    engine.step()
    with torch.no_grad():
        next(iter(broken.slot.adapters.values())).b_OR.fill_(float("nan"))
    curves = run_all(engine)
    assert broken.state == "failed"
    assert "the loss is nan" in broken.problem
    assert "learning_rate" in broken.problem
    assert healthy.state == "done"
    assert [report.loss for report in curves[healthy.name]] == pytest.approx(expected[1:], rel=1e-9)


def _run_one(engine: Engine, job: TrainingJob) -> list:
    return run_all(engine)[job.name]


def test_an_exploding_loss_is_noticed(llama: Base, make_examples: MakeExamples) -> None:
    engine = Engine(llama)
    slot = llama.bank.add(AdapterSpec(rank=2, targets=("lm_head",)), 0)  # no norm after it keeps the logits small
    spec = TrainSpec(learning_rate=3.0, schedule="constant", max_grad_norm=0.0, batch_size=2, epochs=9)
    job = TrainingJob("job", slot, make_examples(16, 0), spec)
    engine.add(job)
    run_all(engine)
    assert job.state == "failed"
    assert "the loss has exploded" in job.problem
    assert job.step < 12


@pytest.mark.parametrize(
    "losses",
    [
        [3, 2, 4, 1, 3, 5, 2, 3, 4, 4, 3],  # noise
        [0.01] * 5 + [0.5, 0.001] * 5,  # single rows of a task that is nearly learnt
        [12, 9, 6, 5, 4, 3, 2],
        [0.5] * 5 + [2.5] * 9,  # worse, but no explosion
        [5] * 5 + [1, 1, 15, 1, 1, 1],  # one odd batch
    ],
)
def test_an_ordinary_loss_is_left_alone(losses: list[float]) -> None:
    watch = LossWatch()
    assert [watch.problem(loss) for loss in losses] == [""] * len(losses)


@pytest.mark.parametrize("losses", [[1] * 5 + [9] * 9, [4] * 5 + [12] * 9, [9, 30, 60, 90, 90, 90, 90], [30] * 9])
def test_an_explosion_is_told(losses: list[float]) -> None:
    watch = LossWatch()
    problems = [watch.problem(loss) for loss in losses]
    assert "exploded" in next(filter(None, problems))
    assert not any(problems[:5])


def test_a_job_without_examples(llama: Base) -> None:
    with pytest.raises(ValueError, match="no examples"):
        make_job(llama, [])


def test_progress_state_comes_back(llama: Base, make_examples: MakeExamples) -> None:
    engine = Engine(llama)
    job = make_job(llama, make_examples(16, 0), epochs=3)
    engine.add(job)
    for _ in range(7):
        engine.step()
    other = make_job(llama, make_examples(16, 0), epochs=3)
    other.load_progress_state(job.progress_state())
    assert other.progress_state() == job.progress_state()
    assert other.num_tokens_done == job.num_tokens_done > 0


def test_each_epoch_draws_other_masks(llama: Base, make_examples: MakeExamples) -> None:
    job = make_job(llama, make_examples(8, 0))
    draws = Counter()  # type: ignore[var-annotated]
    for _ in range(job.total_steps):
        draws.update(item.draw for item in job.next_micro_batch())
        job.restart_step()
        job.optimizer.num_steps += 1
    assert len(draws) == 16
    assert set(draws.values()) == {1}


# -- accuracy


@pytest.mark.parametrize("kind", [0, 3, 8, PREFERENCE], ids=["tokens", "classes", "tags", "pairs"])
def test_a_steps_accuracy_is_that_of_its_batch_before_the_step(
    llama: Base, make_examples: MakeExamples, kind: int
) -> None:
    """Beside another job, and split into micro-batches: what scoring the same batch says."""
    engine = Engine(llama)
    job = add_job(engine, kind, make_examples)
    add_job(engine, 1, make_examples)
    found, expected = [], []
    before = scored_accuracy(llama, job)
    while engine.has_work:
        for report in engine.step():
            if report.job == job.name:
                found.append(report.accuracy)
                expected.append(before)
                before = scored_accuracy(llama, job) if job.is_active else 0.0
    assert len(found) == job.total_steps
    assert found == pytest.approx(expected)
    assert len(set(found)) > 1


def scored_accuracy(base: Base, job: TrainingJob) -> float:
    batch = [job.examples[int(i)] for i in job.batch_indices(job.step)]
    reports = score_examples(base, batch, job.slot.index)
    if any(report.pair is not None for report in reports):
        margins = [report.pair.reward_margin for report in reports if report.pair is not None]
        return float(np.mean([0.5 if abs(margin) <= 1e-5 else margin > 0 for margin in margins]))
    return sum(report.num_correct for report in reports) / sum(report.num_targets for report in reports)
