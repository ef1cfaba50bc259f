"""The engine's contract: company, splitting, leaving and coming back change nothing about a job.

Every test runs on a tiny Llama and on a tiny Phi-3 with LongRoPE and a sliding window, in float64 at 1e-9 unless it
says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from slots import slot_logits
from torch import Tensor

from engine.conftest import KINDS, UNDROPPED, adapter_of, add_job, run_all
from luthier.base.load import Base, load_base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.pack import PackItem, pack
from luthier.engine.slot import Slot
from luthier.engine.step import train_step
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]

pytestmark = pytest.mark.usefixtures("wide_norms")


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("fast", [False, True], ids=["modules", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_alone_equals_the_same_job_among_others(
    folder: Path, kind: int, fast: bool, make_examples: MakeExamples
) -> None:
    """With blocks, a job that they serve runs through them alone, and through the model's own modules in company."""
    alone = Engine(load_base(folder, dtype="float64", wants_fast_body=fast))
    assert alone.base.is_packed, alone.base.packing_problem
    assert (alone.base.fast_body is not None) == fast
    lonely = add_job(alone, kind, make_examples)
    lonely_curve = run_all(alone)[lonely.name]

    together = Engine(load_base(folder, dtype="float64", wants_fast_body=fast))
    jobs = [add_job(together, other, make_examples) for other in KINDS]
    curve = run_all(together)[lonely.name]

    assert len(curve) == lonely.total_steps
    np.testing.assert_allclose([r.loss for r in curve], [r.loss for r in lonely_curve], rtol=1e-9)
    np.testing.assert_allclose([r.grad_norm for r in curve], [r.grad_norm for r in lonely_curve], rtol=1e-9)
    assert_close(adapter_of(jobs[kind]), adapter_of(lonely))


@pytest.mark.parametrize("fast", [False, True], ids=["modules", "blocks"])
@pytest.mark.parametrize("kind", UNDROPPED)
def test_company_on_the_fused_path_changes_nothing(
    folder: Path, kind: int, fast: bool, make_examples: MakeExamples
) -> None:
    """The same without a neighbour that drops, so that all layers of one input and all slots run as one node."""
    adapters = []
    others = UNDROPPED
    if fast:
        others = [other for other in UNDROPPED if (KINDS[other].method, KINDS[other].init) == ("lora", "default")]
    for company in ([kind], [kind, *(other for other in others if other != kind)]):
        engine = Engine(load_base(folder, dtype="float64", wants_fast_body=fast))
        jobs = {other: add_job(engine, other, make_examples, num=7) for other in company}
        run_all(engine)
        adapters.append(adapter_of(jobs[kind]))
    assert_close(*adapters, tolerance=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_company_in_float32_stays_within_tolerance(folder: Path, kind: int, make_examples: MakeExamples) -> None:
    alone = Engine(load_base(folder))
    lonely = add_job(alone, kind, make_examples)
    lonely_curve = run_all(alone)[lonely.name]
    together = Engine(load_base(folder))
    jobs = {other: add_job(together, other, make_examples) for other in KINDS}
    curve = run_all(together)[lonely.name]
    np.testing.assert_allclose([r.loss for r in curve], [r.loss for r in lonely_curve], rtol=1e-4)
    company, solitude = adapter_of(jobs[kind]), adapter_of(lonely)
    for name in solitude:
        assert float((company[name] - solitude[name]).norm()) <= 1e-4 * float(solitude[name].norm()), name


@pytest.mark.parametrize("kind", [0, 4, 6])
def test_stepping_one_job_leaves_the_others_bytes_alone(base: Base, kind: int, make_examples: MakeExamples) -> None:
    engine = Engine(base)
    jobs = [add_job(engine, other, make_examples) for other in (kind, 1)]
    for _ in range(3):
        engine.step()
    idle = engine.remove(jobs[0].name)  # its weight decay is on
    values, moments = adapter_of(idle), {n: t.clone() for n, t in idle.optimizer.state().items()}
    run_all(engine)
    assert jobs[1].state == "done"
    assert all(torch.equal(values[n], p) for n, p in idle.slot.parameters().items())
    assert all(torch.equal(moments[n], t) for n, t in idle.optimizer.state().items())
    assert all(p.grad is None for p in idle.slot.parameters().values())


def test_the_base_never_changes(base: Base, make_examples: MakeExamples) -> None:
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    engine = Engine(base)
    for kind in KINDS:
        add_job(engine, kind, make_examples, num=5)
    run_all(engine)
    after = {name.replace(".base.", "."): p for name, p in base.model.named_parameters()}
    before = {name.replace(".base.", "."): p for name, p in before.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("kind", [0, 4, 6])
def test_a_job_may_leave_and_come_back(folder: Path, kind: int, make_examples: MakeExamples) -> None:
    whole = Engine(load_base(folder, dtype="float64"))
    steady = add_job(whole, kind, make_examples)
    run_all(whole)

    engine = Engine(load_base(folder, dtype="float64"))
    job = add_job(engine, kind, make_examples)
    add_job(engine, 1, make_examples)
    while job.step < 3:
        engine.step()
    engine.remove(job.name)
    for _ in range(2):
        engine.step()
    engine.add(job)
    run_all(engine)
    assert_close(adapter_of(job), adapter_of(steady))


@pytest.mark.parametrize("micro_batch_tokens", [16, 50, 4096])
@pytest.mark.parametrize("kind", [0, 4, 6])
def test_splitting_an_optimizer_batch_changes_nothing(
    folder: Path, make_examples: MakeExamples, kind: int, micro_batch_tokens: int
) -> None:
    """Accumulated micro-batches give the gradient of the whole batch, though they differ in supervised tokens."""
    adapters = []
    for tokens in (100_000, micro_batch_tokens):
        engine = Engine(load_base(folder, dtype="float64"))
        slot = engine.base.bank.add(KINDS[kind], seed=5)
        job = TrainingJob(
            "a", slot, make_examples(10, 9), TrainSpec(batch_size=5, learning_rate=1e-2, micro_batch_tokens=tokens)
        )
        engine.add(job)
        run_all(engine)
        adapters.append(adapter_of(job))
    assert_close(*adapters)


def test_a_neighbours_token_count_does_not_scale_the_gradient(base: Base, make_examples: MakeExamples) -> None:
    first, second = base.bank.add(AdapterSpec(rank=4), 0), base.bank.add(AdapterSpec(rank=4), 1)
    mine, many = make_examples(2, 0), make_examples(9, 1)

    def gradient(neighbours: list[Example]) -> dict[str, Tensor]:
        items = [PackItem(e, first.index) for e in mine] + [PackItem(e, second.index) for e in neighbours]
        batch = pack(items)
        weights = {s.slot: float(batch.target_weight_P[s.start : s.end].sum()) for s in batch.target_segments}
        train_step(base, batch, weights)
        found = {n: p.grad.clone() for n, p in first.parameters().items() if p.grad is not None}
        for slot in (first, second):
            for parameter in slot.parameters().values():
                parameter.grad = None
        return found

    assert_close(gradient([]), gradient(many))
    assert any(g.abs().max() > 0 for g in gradient([]).values())


@pytest.mark.parametrize("kind", [0, 4, 6, 7])
def test_a_snapshot_keeps_saying_what_it_said(base: Base, kind: int, make_examples: MakeExamples) -> None:
    engine = Engine(base)
    job = add_job(engine, kind, make_examples)
    engine.step()
    [sequence] = make_examples(1, 9, longest=20)

    def logits(slot: Slot) -> Tensor:
        return slot_logits(base, slot, [sequence.tokens])[0]

    snapshot = base.bank.snapshot(job.slot)
    before = logits(snapshot)
    assert torch.equal(before, logits(job.slot))
    run_all(engine)
    assert torch.equal(before, logits(snapshot))
    assert not torch.equal(before, logits(job.slot))
    assert not any(parameter.requires_grad for parameter in snapshot.parameters().values())


@pytest.mark.parametrize("kind", [0, 4, 6])
def test_packed_neighbours_do_not_see_each_other(base: Base, kind: int, make_examples: MakeExamples) -> None:
    examples = make_examples(6, 3)
    slot = base.bank.add(KINDS[kind], 0)
    _shake(slot)

    def hidden(chosen: list[Example]) -> Tensor:
        batch = pack([PackItem(e, slot.index) for e in chosen])
        with torch.no_grad(), base.bank.routed(base.routing(batch, training=False)):
            return base.forward(batch).hidden_TD

    apart = torch.cat([hidden([example]) for example in examples])
    torch.testing.assert_close(hidden(examples), apart, rtol=1e-9, atol=1e-9)


def test_long_neighbours_do_not_change_the_rotary_factors_of_short_ones(
    tiny_phi3: Path, make_examples: MakeExamples
) -> None:
    """LongRoPE picks its factors by length: each sequence must get those that transformers gives it alone."""
    from transformers import AutoModelForCausalLM

    examples = [make_examples(1, seed, longest=n + 1)[0] for seed, n in ((0, 8), (1, 30))]
    long = Example(np.arange(4, 64, dtype=np.int32), np.zeros(60, dtype=np.float32))
    base = load_base(tiny_phi3, dtype="float64")
    assert base.is_packed, base.packing_problem
    batch = pack([PackItem(e, -1) for e in [*examples, long]])
    with torch.no_grad():
        packed = base.forward(batch).hidden_TD
        model = AutoModelForCausalLM.from_pretrained(tiny_phi3, dtype=torch.float64)
        alone = [
            model.model(torch.from_numpy(e.tokens.astype(np.int64))[None], use_cache=False).last_hidden_state[0]
            for e in [*examples, long]
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kinds", [tuple(KINDS), tuple(UNDROPPED)], ids=["all", "undropped"])
def test_the_fused_node_equals_the_plain_reference(
    folder: Path, kinds: tuple[int, ...], make_examples: MakeExamples
) -> None:
    curves, adapters = [], []
    for use_reference in (False, True):
        engine = Engine(load_base(folder, dtype="float64", use_reference=use_reference))
        jobs = [add_job(engine, kind, make_examples, num=7) for kind in kinds]
        curves.append({name: [r.loss for r in curve] for name, curve in run_all(engine).items()})
        adapters.append([adapter_of(job) for job in jobs])
    for name in curves[0]:
        np.testing.assert_allclose(curves[0][name], curves[1][name], rtol=1e-9)
    for left, right in zip(*adapters, strict=True):
        assert_close(left, right)


def test_recomputing_activations_changes_nothing(folder: Path, make_examples: MakeExamples) -> None:
    """Dropout included: its masks come from a counter, so the recomputed forward draws the same."""
    curves = []
    for checkpointing in (False, True):
        base = load_base(folder, dtype="float64")
        base.set_checkpointing(checkpointing)
        engine = Engine(base)
        for kind in (0, 2, 4, 5, 6):
            add_job(engine, kind, make_examples)
        curves.append({name: [r.loss for r in curve] for name, curve in run_all(engine).items()})
    assert curves[0].keys() == curves[1].keys()
    for name in curves[0]:
        np.testing.assert_allclose(curves[0][name], curves[1][name], rtol=1e-9)


def test_a_padded_base_equals_a_packed_one(folder: Path, make_examples: MakeExamples) -> None:
    curves = []
    for packed in (True, False):
        base = load_base(folder, dtype="float64")
        base.is_packed = packed
        engine = Engine(base)
        for kind in KINDS:
            add_job(engine, kind, make_examples)
        curves.append({name: [r.loss for r in curve] for name, curve in run_all(engine).items()})
    for name in curves[0]:
        np.testing.assert_allclose(curves[0][name], curves[1][name], rtol=1e-9)


def _shake(slot: object) -> None:
    """Give the zero-initialized factors values, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in slot.parameters().values():  # type: ignore[attr-defined]
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
