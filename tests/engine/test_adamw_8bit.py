"""AdamW of bitsandbytes as one job's optimizer: close to plain AdamW, saved and resumed to the byte, per slot."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from luthier.engine.adamw import SMALLEST_QUANTIZED, STATE_BLOCK
from luthier.engine.optimizer import JobOptimizer
from luthier.types import TrainSpec

SPEC = TrainSpec(learning_rate=1e-2, weight_decay=0.05, schedule="constant", optimizer="adamw_8bit")
LARGE, SMALL = (96, 64), (8, 64)
"""More and fewer values than bitsandbytes quantizes the moments of."""


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(*size, generator=generator)) for name, size in (("a", LARGE), ("b", SMALL))}


def descend(named: dict[str, nn.Parameter], optimizer: JobOptimizer, steps: range) -> list[float]:
    """Some steps towards a target, with noisy gradients that follow from the step; the distances to it."""
    distances = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        distances.append(sum(float(p.detach().square().mean()) for p in named.values()))
        for parameter in named.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = parameter.detach() + 0.1 * noise
        optimizer.step()
    return distances


def test_it_stays_with_plain_adamw() -> None:
    spec = replace(SPEC, max_grad_norm=0.0)  # clipping would let the two parameters see each other
    ours, plain = parameters(), parameters()
    quantized = descend(ours, JobOptimizer(ours, spec, 60), range(60))
    exact = descend(plain, JobOptimizer(plain, replace(spec, optimizer="adamw"), 60), range(60))
    assert exact[-1] < 0.5 * exact[0]
    assert quantized == pytest.approx(exact, rel=0.02)
    # Each value's way is close too, and the small parameter's, in float32, equal but for rounding.
    moved = (plain["a"] - parameters()["a"]).detach().norm()
    assert 0 < float((ours["a"] - plain["a"]).detach().norm() / moved) < 0.05
    torch.testing.assert_close(ours["b"], plain["b"], rtol=1e-4, atol=1e-5)


def test_moments_are_bytes_but_for_small_parameters() -> None:
    named = parameters()
    optimizer = JobOptimizer(named, SPEC, 10)
    descend(named, optimizer, range(1))
    state = optimizer.state()
    assert named["b"].numel() < SMALLEST_QUANTIZED <= named["a"].numel()
    assert {state[f"a.{m}"].dtype for m in ("exp_avg", "exp_avg_sq")} == {torch.uint8}
    assert {state[f"b.{m}"].dtype for m in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert state["a.exp_avg.scales"].numel() == LARGE[0] * LARGE[1] // STATE_BLOCK
    taken = sum(t.numel() * t.element_size() for name, t in state.items() if not name.endswith(".code"))
    assert optimizer.state_bytes == taken
    plain = JobOptimizer(parameters(), replace(SPEC, optimizer="adamw"), 10)
    assert plain.state_bytes == 2 * 4 * sum(p.numel() for p in named.values())


@pytest.mark.parametrize("skip", [False, True])
def test_what_was_saved_goes_on_to_the_same_bytes(skip: bool, tmp_path: Path) -> None:
    """Through a file; also where one parameter counts fewer steps than the job."""

    def run(named: dict[str, nn.Parameter], optimizer: JobOptimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for name, parameter in named.items():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                if skip and step == 1 and name == "a":
                    parameter.grad = None
            optimizer.step()

    whole = parameters()
    steady = JobOptimizer(whole, SPEC, 12)
    run(whole, steady, range(6))
    save_file({name: t.clone() for name, t in steady.state().items()}, tmp_path / "optimizer.safetensors")
    values = {name: p.detach().clone() for name, p in whole.items()}
    run(whole, steady, range(6, 12))

    fresh = parameters(seed=9)
    for name, parameter in fresh.items():
        parameter.data.copy_(values[name])
    resumed = JobOptimizer(fresh, SPEC, 12)
    resumed.load_state(load_file(tmp_path / "optimizer.safetensors"), 6)
    run(fresh, resumed, range(6, 12))
    assert all(torch.equal(fresh[name], whole[name]) for name in whole)
    ours, theirs = resumed.state(), steady.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_job_that_is_not_stepped_does_not_change_by_a_bit() -> None:
    still, busy = parameters(1), parameters(2)
    first, second = JobOptimizer(still, SPEC, 10), JobOptimizer(busy, SPEC, 10)
    descend(still, first, range(2))
    values = {name: p.detach().clone() for name, p in still.items()}
    moments = {name: t.clone() for name, t in first.state().items()}
    before = {name: p.detach().clone() for name, p in busy.items()}
    descend(busy, second, range(5))
    assert all(torch.equal(values[name], still[name]) for name in still)
    assert all(torch.equal(moments[name], t) for name, t in first.state().items())
    assert not any(torch.equal(before[name], busy[name]) for name in busy)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        JobOptimizer({"a": nn.Parameter(torch.zeros(4, dtype=torch.float64))}, SPEC, 1)


def test_paged_moments_are_no_need_on_the_device() -> None:
    named = {"large": nn.Parameter(torch.zeros(400, 300)), "small": nn.Parameter(torch.zeros(100, 100))}
    sizes = {
        name: JobOptimizer(named, replace(SPEC, optimizer=name), 1).state_bytes  # type: ignore[arg-type]
        for name in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
    }
    assert sizes["adamw"] == 8 * 130_000
    assert sizes["paged_adamw"] == 8 * 10_000
    assert sizes["adamw_8bit"] < 0.27 * sizes["adamw"]
    assert sizes["paged_adamw_8bit"] < sizes["adamw_8bit"]
    assert all(a != b for a, b in itertools.pairwise(sizes.values()))
