"""One job's AdamW: the schedule's values, exact resumption, and gradients that are not numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from luthier.engine.optimizer import JobOptimizer, learning_rate_at
from luthier.types import TrainSpec

SPEC = TrainSpec(learning_rate=0.1, weight_decay=0.05, betas=(0.8, 0.95), max_grad_norm=1.0)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(4, 3, generator=generator)) for name in ("first", "second")}


def give_gradients(named: dict[str, nn.Parameter], step: int, size: float = 1.0, skip: str = "") -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in named.items():
        gradient = torch.randn(parameter.shape, generator=generator) * size
        parameter.grad = None if name == skip else gradient


def test_cosine_equals_transformers_own() -> None:
    from transformers import get_cosine_schedule_with_warmup

    parameter = nn.Parameter(torch.zeros(1))
    scheduler = get_cosine_schedule_with_warmup(torch.optim.SGD([parameter], lr=0.1), 0, 50)
    for step in range(51):
        assert learning_rate_at(step, 50, SPEC) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        scheduler.optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(schedule: str) -> None:
    spec = TrainSpec(learning_rate=0.2, schedule=schedule, warmup_steps=4, min_learning_rate_ratio=0.25)  # type: ignore[arg-type]
    rates = [learning_rate_at(step, 24, spec) for step in range(26)]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])  # a first step that moves, an even rise
    half = {"cosine": 0.25 + 0.75 * 0.5, "linear": 0.25 + 0.75 * 0.5, "constant": 1.0}[schedule]
    quarter = {"cosine": 0.25 + 0.75 * 0.5 * (1 + math.sqrt(0.5)), "linear": 0.25 + 0.75 * 0.75, "constant": 1.0}[
        schedule
    ]
    assert rates[14] == pytest.approx(0.2 * half)
    assert rates[9] == pytest.approx(0.2 * quarter)
    assert rates[24] == rates[25] == pytest.approx(0.2 if schedule == "constant" else 0.05)
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(rates[4:]))


def test_a_schedule_of_warm_up_alone() -> None:
    spec = TrainSpec(learning_rate=1.0, warmup_steps=9)
    assert [learning_rate_at(step, 3, spec) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_steps_equal_plain_adamw_with_clipping() -> None:
    ours, plain = parameters(), parameters()
    job = JobOptimizer(ours, SPEC, total_steps=12)
    adamw = torch.optim.AdamW(plain.values(), lr=0.1, betas=(0.8, 0.95), eps=SPEC.eps, weight_decay=0.05, foreach=False)
    for step in range(12):
        size = 10.0 if step % 2 else 0.01  # clipped and not
        give_gradients(ours, step, size)
        give_gradients(plain, step, size)
        expected = nn.utils.clip_grad_norm_(plain.values(), 1.0)
        adamw.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 12))
        adamw.step()
        norm, rate = job.step()
        assert norm == pytest.approx(float(expected))
        assert rate == pytest.approx(adamw.param_groups[0]["lr"])
        assert all(parameter.grad is None for parameter in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("skip", ["", "second"])
def test_what_was_saved_goes_on_to_the_same_bytes(skip: str) -> None:
    """Also where one parameter gets no gradient in some steps, and so counts fewer steps of its own."""
    whole = parameters()
    steady = JobOptimizer(whole, SPEC, 10)
    for step in range(10):
        give_gradients(whole, step, skip=skip if step in (1, 2, 6) else "")
        steady.step()
        if step == 4:
            values = {name: parameter.detach().clone() for name, parameter in whole.items()}
            saved, num_steps = {name: t.clone() for name, t in steady.state().items()}, steady.num_steps
    fresh = parameters(seed=9)
    for name, parameter in fresh.items():
        parameter.data.copy_(values[name])
    resumed = JobOptimizer(fresh, SPEC, 10)
    resumed.load_state(saved, num_steps)
    assert resumed.num_steps == 5
    for step in range(5, 10):
        give_gradients(fresh, step, skip=skip if step == 6 else "")
        assert resumed.learning_rate == learning_rate_at(step, 10, SPEC)
        resumed.step()
    assert all(torch.equal(fresh[name], whole[name]) for name in whole)
    assert resumed.state().keys() == steady.state().keys()
    assert all(torch.equal(tensor, steady.state()[name]) for name, tensor in resumed.state().items())


def test_loading_copies() -> None:
    named = parameters()
    job = JobOptimizer(named, SPEC, 10)
    give_gradients(named, 0)
    job.step()
    saved = {name: tensor.clone() for name, tensor in job.state().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    other = JobOptimizer(parameters(), SPEC, 10)
    other.load_state(saved, 1)
    give_gradients(other.parameters, 1)
    other.step()
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_not_applied(bad: float) -> None:
    named = parameters()
    job = JobOptimizer(named, SPEC, 10)
    give_gradients(named, 0)
    job.step()
    values = {name: parameter.detach().clone() for name, parameter in named.items()}
    moments = {name: tensor.clone() for name, tensor in job.state().items()}
    give_gradients(named, 1)
    assert named["second"].grad is not None
    named["second"].grad[0, 0] = bad
    norm, _ = job.step()
    assert not math.isfinite(norm)
    assert job.num_steps == 1
    assert all(torch.equal(values[name], named[name]) for name in named)
    assert all(torch.equal(moments[name], tensor) for name, tensor in job.state().items())
    assert all(parameter.grad is None for parameter in named.values())


def test_no_clipping_at_zero() -> None:
    named, plain = parameters(), parameters()
    job = JobOptimizer(named, TrainSpec(learning_rate=0.1, schedule="constant", max_grad_norm=0.0), 10)
    adamw = torch.optim.AdamW(plain.values(), lr=0.1, weight_decay=0.0)
    for step in range(3):
        give_gradients(named, step, 50.0 * (step + 1))
        give_gradients(plain, step, 50.0 * (step + 1))
        job.step()
        adamw.step()
    torch.testing.assert_close(named["first"], plain["first"], rtol=1e-6, atol=1e-7)
