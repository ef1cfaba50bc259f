"""Several ranks train as one process does, in rounds that no rank can leave another waiting in.

Ranks are threads here, each with a base of its own; `tests/worker/test_ranks.py` has processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.conftest import KINDS, adapter_of, add_job, run_all
from luthier.base.load import load_base
from luthier.distributed.thread_ranks import ThreadRanks, thread_ranks
from luthier.engine import engine as module
from luthier.engine.engine import Engine
from luthier.engine.job import StepReport, TrainingJob
from luthier.engine.pack import PackedBatch
from luthier.engine.ranks import ALONE, Ranks, any_of, check_alike
from luthier.engine.rounds import share_by_tokens, sum_gradients
from luthier.errors import ProcessLostError, RunError
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]
AddJobs = Callable[[Engine], list[TrainingJob]]


@dataclass
class Outcome:
    """What training gave on one rank."""

    curves: dict[str, list[StepReport]]
    tensors: dict[str, Tensor]
    states: dict[str, str]
    sums: list[tuple[int, ...]]


def run_engine(engine: Engine, add_jobs: AddJobs) -> Outcome:
    jobs = add_jobs(engine)
    curves = run_all(engine)
    tensors = {f"{job.name} {name}": t for job in jobs for name, t in adapter_of(job).items()}
    tensors |= {f"{job.name} {name}": t for job in jobs for name, t in job.optimizer.state().items()}
    return Outcome(curves, tensors, {job.name: job.state for job in jobs}, getattr(engine.ranks, "shapes", []))


def train_alone(folder: Path, add_jobs: AddJobs) -> Outcome:
    return run_engine(Engine(load_base(folder, dtype="float64")), add_jobs)


def train_on_ranks(folder: Path, size: int, add_jobs: AddJobs, budgets: list[int] | None = None) -> list[Outcome]:
    bases = [load_base(folder, dtype="float64") for _ in range(size)]  # loading is for one thread at a time

    def work(ranks: ThreadRanks) -> Outcome:
        engine = Engine(bases[ranks.rank], ranks=ranks)
        if budgets is not None:
            engine.budget_tokens = budgets[ranks.rank]
        return run_engine(engine, add_jobs)

    return thread_ranks(size, work)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.states == expected.states
    for name, curve in expected.curves.items():
        for field in ("step", "loss", "grad_norm", "num_tokens", "num_supervised_tokens", "learning_rate", "accuracy"):
            values = [[getattr(report, field) for report in reports] for reports in (found.curves[name], curve)]
            np.testing.assert_allclose(*values, rtol=1e-9, err_msg=f"{name}: {field}")
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_bytes(outcomes: list[Outcome]) -> None:
    first = outcomes[0]
    for other in outcomes[1:]:
        assert all(torch.equal(first.tensors[name], tensor) for name, tensor in other.tensors.items())
        assert other.states == first.states
        assert other.sums == first.sums
        for name, curve in first.curves.items():
            pairs = zip(curve, other.curves[name], strict=True)
            assert all((a.loss, a.grad_norm) == (b.loss, b.grad_norm) for a, b in pairs)


@pytest.mark.usefixtures("wide_norms")
def test_jobs_of_every_kind_together_equal_one_process(folder: Path, make_examples: MakeExamples) -> None:
    """Batches of 1 to 5 sequences over 3 ranks, so that some have none; dropout, heads, rates, micro-batches.

    One job trains the rows of tokens that few of its batches hold.
    """

    def add_jobs(engine: Engine) -> list[TrainingJob]:
        spec = AdapterSpec(rank=2, targets=("o_proj",), new_tokens=(5, 321))
        rare = TrainingJob("rare", engine.base.bank.add(spec, 9), make_examples(7, 9), TrainSpec(batch_size=2))
        engine.add(rare)
        return [rare, *(add_job(engine, kind, make_examples, 7) for kind in KINDS)]

    outcomes = train_on_ranks(folder, 3, add_jobs)
    assert_equal(outcomes[0], train_alone(folder, add_jobs))
    assert_same_bytes(outcomes)


@pytest.mark.usefixtures("wide_norms")
def test_company_does_not_change_a_job_of_several_ranks(tiny_llama: Path, make_examples: MakeExamples) -> None:
    def lonely(engine: Engine) -> list[TrainingJob]:
        return [add_job(engine, 2, make_examples)]

    def among(engine: Engine) -> list[TrainingJob]:
        return [add_job(engine, kind, make_examples) for kind in (0, 1, 2)][2:]

    found, expected = train_on_ranks(tiny_llama, 2, among)[0], train_alone(tiny_llama, lonely)
    found.curves = {name: found.curves[name] for name in expected.curves}
    assert_equal(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_never_wait_for_different_sums(
    tiny_llama: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Jobs of very different sizes, ranks of different speed and with room for forwards of different sizes."""
    run = module.train_step

    def at_random_speed(*given: Any) -> Any:
        time.sleep(float(np.random.default_rng().uniform(0, 0.004)))
        return run(*given)

    monkeypatch.setattr(module, "train_step", at_random_speed)
    draw = np.random.default_rng(seed)
    sizes = [(int(draw.integers(1, 9)), int(draw.integers(1, 16)), int(draw.integers(6, 60))) for _ in range(6)]

    def add_jobs(engine: Engine) -> list[TrainingJob]:
        jobs = []
        for index, (batch_size, num, longest) in enumerate(sizes):
            spec = TrainSpec(epochs=2, batch_size=batch_size, seed=index, micro_batch_tokens=70)
            slot = engine.base.bank.add(AdapterSpec(rank=1 + index, targets=("o_proj",)), seed=index)
            jobs.append(TrainingJob(f"job-{index}", slot, make_examples(num, index, longest=longest), spec))
            engine.add(jobs[-1])
        return jobs

    monkeypatch.setattr(module, "DEFAULT_BUDGET_TOKENS", 150)  # so that rounds differ in who takes part
    outcomes = train_on_ranks(tiny_llama, 3, add_jobs, budgets=[40, 100, 1000])
    assert_same_bytes(outcomes)
    assert set(outcomes[0].states.values()) == {"done"}
    assert len(set(outcomes[0].sums)) >= len(sizes) + 2  # a slot's gradient each, and totals of two companies at least


@pytest.mark.usefixtures("wide_norms")
def test_memory_that_runs_out_on_one_rank_shrinks_that_one_alone(
    tiny_llama: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_jobs(engine: Engine) -> list[TrainingJob]:
        jobs = [add_job(engine, kind, make_examples) for kind in (0, 3)]
        small.update({id(job): engine.ranks.rank for job in jobs})
        made.extend(jobs)
        if engine.ranks.rank == 1:
            short.append(engine.base)
        return jobs

    made: list[TrainingJob] = []
    small: dict[int, int] = {}
    short: list[Any] = []
    expected = train_alone(tiny_llama, add_jobs)
    run, refused = module.train_step, []

    def with_little_room(base: Any, batch: PackedBatch, *rest: Any) -> Any:
        if base in short and batch.num_tokens > 40 and batch.num_sequences > 1:
            refused.append(batch.num_tokens)
            run(base, batch, *rest)  # halfway, with gradients there
            raise torch.OutOfMemoryError("no room")
        return run(base, batch, *rest)

    monkeypatch.setattr(module, "train_step", with_little_room)
    made.clear()
    outcomes = train_on_ranks(tiny_llama, 2, add_jobs)
    assert refused
    assert_equal(outcomes[0], expected)
    assert_same_bytes(outcomes)
    sizes = {small[id(job)]: job.micro_batch_tokens for job in made if job.name == "job-0"}
    assert sizes[1] < sizes[0] == 4096


def test_a_job_that_fails_fails_on_all_ranks_and_no_other_does(tiny_llama: Path, make_examples: MakeExamples) -> None:
    def add_jobs(engine: Engine) -> list[TrainingJob]:
        jobs = [add_job(engine, kind, make_examples) for kind in (0, 1)]
        if engine.ranks.rank == 1:  # one rank's share alone
            next(iter(jobs[0].slot.parameters().values())).data.fill_(float("nan"))
        return jobs

    outcomes = train_on_ranks(tiny_llama, 2, add_jobs)
    assert [outcome.states for outcome in outcomes] == [{"job-0": "failed", "job-1": "done"}] * 2


def test_a_rank_that_is_gone_is_noticed(tiny_llama: Path, make_examples: MakeExamples) -> None:
    have_summed = threading.Event()

    def work(ranks: ThreadRanks) -> None:
        any_of(ranks, False)
        if ranks.rank == 1:
            have_summed.wait(60)  # leaving any earlier may break the first sum
            ranks.leave()
            return
        have_summed.set()
        with pytest.raises(ProcessLostError, match="rank 0 has lost"):
            any_of(ranks, False)

    thread_ranks(2, work)


def test_sharing_balances_tokens_and_is_the_same_on_all() -> None:
    loads = [0, 0, 0]
    assert share_by_tokens([5, 40, 7, 6, 30, 30], loads) == [[1], [2, 4], [0, 3, 5]]
    assert loads == [40, 37, 41]
    assert share_by_tokens([9], loads) == [[], [0], []]
    draw = np.random.default_rng(0)
    for _ in range(20):
        lengths = draw.integers(1, 100, size=int(draw.integers(1, 30))).tolist()
        loads = [0] * 4
        shares = share_by_tokens(lengths, loads)
        assert sorted(position for share in shares for position in share) == list(range(len(lengths)))
        assert loads == [sum(lengths[p] for p in share) for share in shares]
        assert max(loads) - min(loads) <= max(lengths)


def test_a_parameter_without_a_gradient_anywhere_gets_none() -> None:
    """Whatever its layout, a gradient is summed; one that a single rank has is given to the others."""

    def work(ranks: Ranks) -> list[Tensor | None]:
        parameters = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2)]
        parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
        if ranks.rank == 1:
            parameters[0].grad = torch.arange(6.0).reshape(2, 3).t()
        parameters[1].grad = torch.full((3, 2), float(ranks.rank + 1))
        parameters[2].grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
        sum_gradients(ranks, parameters)
        return [parameter.grad for parameter in parameters]

    for first, second, third in thread_ranks(2, work):
        assert first.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        assert second.tolist() == [[3.0, 3.0]] * 3
        assert third.tolist() == [2.0, 4.0]


def test_replicas_that_differ_by_one_bit_are_told_on_every_rank() -> None:
    def work(ranks: Ranks) -> str:
        values = torch.ones(5)
        check_alike(ranks, [values], "the adapter")
        if ranks.rank == 2:
            values[3] = torch.nextafter(values[3], torch.tensor(2.0))
        with pytest.raises(RunError, match="the adapter differs between rank 0 and rank 2") as told:
            check_alike(ranks, [values], "the adapter")
        return str(told.value)

    assert len(set(thread_ranks(3, work))) == 1


def test_what_one_rank_knows_all_decide() -> None:
    assert thread_ranks(3, lambda ranks: any_of(ranks, ranks.rank == 1)) == [True] * 3
    assert thread_ranks(3, lambda ranks: any_of(ranks, False)) == [False] * 3
    assert any_of(ALONE, True)
    assert not any_of(ALONE, False)
