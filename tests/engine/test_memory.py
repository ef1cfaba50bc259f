"""Predicted memory: against what a forward really keeps, and what follows from it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, write_tiny_llama
from torch import Tensor

from luthier.base.load import Base, load_base
from luthier.engine import memory
from luthier.engine.job import TrainingJob
from luthier.engine.memory import (
    activation_bytes_per_token,
    fit_micro_batches,
    head_bytes_per_token,
    largest_micro_batch,
    plan_memory,
)
from luthier.engine.pack import PackItem, pack
from luthier.engine.slot import Slot
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]
GIB = 2**30


def held_bytes(base: Base, slot: Slot, lengths: list[int]) -> int:
    """Bytes of every tensor that a training forward's graph keeps, the weights apart; each storage counted once."""
    storages: dict[int, tuple[Tensor, int]] = {}
    fixed = {p.untyped_storage().data_ptr() for p in [*base.model.parameters(), *slot.parameters().values()]}
    fixed |= {tensor.untyped_storage().data_ptr() for tensor in slot.constants()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    random = np.random.default_rng(0)
    items = [
        PackItem(Example(random.integers(4, 250, n).astype(np.int32), np.ones(n, np.float32)), slot.index)
        for n in lengths
    ]
    batch = pack(items)
    with (
        base.bank.routed(base.routing(batch, training=True)),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        base.forward(batch)
    return sum(size for _, size in storages.values())


SPECS = {
    "small": AdapterSpec(rank=2),
    "large": AdapterSpec(rank=32),
    "dropout": AdapterSpec(rank=4, dropout=0.2),
    "few targets": AdapterSpec(rank=4, targets=("o_proj",)),
    "a norm in full": AdapterSpec(rank=4, targets=("o_proj",), modules_to_save=("norm",)),
    "new tokens": AdapterSpec(rank=4, new_tokens=(5, VOCAB_SIZE + 1)),
    "dora": AdapterSpec(method="dora", rank=4),
    "dora with dropout": AdapterSpec(method="dora", rank=4, dropout=0.2),
    "ia3": AdapterSpec(method="ia3", targets="default"),
    "pissa": AdapterSpec(rank=4, init="pissa"),
}


@pytest.mark.parametrize("lengths", [[40] * 12, [100, 100, 100], [7] * 60], ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_phi3"])
def test_activations_are_predicted_within_a_fifth(
    architecture: str, name: str, lengths: list[int], request: pytest.FixtureRequest
) -> None:
    base = load_base(request.getfixturevalue(architecture))
    slot = base.bank.add(SPECS[name], 0)
    predicted = activation_bytes_per_token(base, slot)
    measured = held_bytes(base, slot, lengths) / sum(lengths)
    assert predicted == pytest.approx(measured, rel=0.2)


def test_measuring_changes_nothing(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)
    slot = base.bank.add(AdapterSpec(rank=2, dropout=0.1), 0)
    before = {name: p.detach().clone() for name, p in slot.parameters().items()}
    assert activation_bytes_per_token(base, slot) == activation_bytes_per_token(base, slot) > 0
    assert all(torch.equal(before[name], p) for name, p in slot.parameters().items())
    assert all(p.grad is None or not p.grad.any() for p in slot.parameters().values())
    assert base.bank.routing.segments == ()


def test_measuring_leaves_nothing_behind(tiny_llama: Path) -> None:
    """Nodes that hold themselves are never freed, and with them all that a forward keeps."""

    def num_nodes() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.autograd.function.BackwardCFunction) for thing in gc.get_objects())

    base = load_base(tiny_llama)
    slot = base.bank.add(AdapterSpec(rank=2), 0)
    before = num_nodes()
    activation_bytes_per_token(base, slot)
    assert num_nodes() == before


def test_recomputation_keeps_far_less(tmp_path: Path) -> None:
    base = load_base(write_tiny_llama(tmp_path, num_hidden_layers=4))
    slot = base.bank.add(AdapterSpec(rank=2), 0)
    kept = activation_bytes_per_token(base, slot)
    base.set_checkpointing(True)
    recomputing = activation_bytes_per_token(base, slot)
    assert recomputing < kept / 3
    assert recomputing >= 4 * base.hidden_size * 4  # each block's input


def test_a_head_that_needs_its_logits_counts_them(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)
    plain, own_head, tokens, classes = (
        base.bank.add(spec, 0)
        for spec in (
            AdapterSpec(rank=2),
            AdapterSpec(rank=2, targets=("lm_head",)),
            AdapterSpec(rank=2, new_tokens=(5,)),
            AdapterSpec(rank=2, num_classes=3),
        )
    )
    assert head_bytes_per_token(base, plain) == head_bytes_per_token(base, classes) == 0
    assert head_bytes_per_token(base, own_head) == head_bytes_per_token(base, tokens) >= 3 * 4 * VOCAB_SIZE


def make_job(base: Base, examples: list[Example], name: str = "a", **train: object) -> TrainingJob:
    spec = TrainSpec(**({"batch_size": 4} | train))  # type: ignore[arg-type]
    return TrainingJob(name, base.bank.add(AdapterSpec(rank=2), 0), examples, spec)


def test_the_sum_by_hand(tiny_llama: Path, make_examples: MakeExamples) -> None:
    base = load_base(tiny_llama)
    jobs = [make_job(base, make_examples(9, seed), str(seed)) for seed in (0, 1)]
    plan = plan_memory(base, jobs, budget_tokens=10**6)
    adapter = sum(4 * p.numel() for p in jobs[0].slot.parameters().values())
    assert plan.base == base.num_bytes == 4 * sum(p.numel() for p in base.model.parameters())
    flat = jobs[0].slot.flat
    assert flat is not None
    largest = max(4 * p.numel() for p in jobs[0].slot.parameters().values())
    assert (plan.adapters, plan.gradients) == (2 * adapter, 2 * adapter + largest)
    assert plan.optimizer == 4 * 4 * flat.values_Z.numel()
    assert plan.tokens == sum(largest_micro_batch(job) for job in jobs)
    assert plan.activations > plan.tokens * plan.per_token
    assert plan.needed == plan.gradients + plan.optimizer + plan.activations
    assert plan.peak == memory.PROCESS_BYTES + plan.base + plan.adapters + plan.needed
    assert plan_memory(base, jobs, budget_tokens=1).tokens == max(largest_micro_batch(job) for job in jobs)


def test_the_largest_micro_batch_is_the_largest_that_will_run(tiny_llama: Path, make_examples: MakeExamples) -> None:
    base = load_base(tiny_llama)
    job = make_job(base, make_examples(23, 0), micro_batch_tokens=70, epochs=3)
    sizes = []
    for step in range(job.total_steps):
        job.optimizer.num_steps = step
        job.restart_step()
        job.next_micro_batch()
        sizes += [sum(item.example.num_tokens for item in part) for part in job._pending]
    assert largest_micro_batch(job) == max(sizes) <= 70


@pytest.mark.parametrize(("free", "fits"), [(10 * GIB, True), (2**20, False), (0, False)])
def test_what_fits_is_what_is_free(
    tiny_llama: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    base = load_base(tiny_llama)
    plan = plan_memory(base, [make_job(base, make_examples(9, 0))], 4096)
    assert plan.available == free
    assert plan.fits == fits


def test_micro_batches_shrink_until_they_fit_and_no_further(
    tiny_llama: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(tiny_llama)
    job = make_job(base, make_examples(40, 0), batch_size=20)
    whole = plan_memory(base, [job], 4096)
    assert fit_micro_batches(base, [job], 4096) == 4096
    assert job.micro_batch_tokens == 4096
    # Room for half of the tokens, past what does not shrink.
    free = int((whole.needed - whole.tokens * whole.per_token / 2) / 0.8)
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    assert whole.needed > 0.8 * free
    budget = fit_micro_batches(base, [job], 4096)
    assert budget == job.micro_batch_tokens
    assert 0.3 * whole.tokens < budget < 0.6 * whole.tokens
    assert plan_memory(base, [job], budget).needed <= 0.8 * free
    assert job.spec.batch_size == 20
    assert len(job.batch_indices(0)) == 20


def test_a_users_smaller_micro_batch_stays(tiny_llama: Path, make_examples: MakeExamples) -> None:
    base = load_base(tiny_llama)
    job = make_job(base, make_examples(9, 0), micro_batch_tokens=50)
    fit_micro_batches(base, [job], 4096)
    assert job.micro_batch_tokens == 50


def test_a_containers_limit_counts(tiny_phi3: Path) -> None:
    free = memory.available_bytes(torch.device("cpu"))
    assert 0 < free <= memory.psutil.virtual_memory().total
    assert free <= memory._cgroup_room()
