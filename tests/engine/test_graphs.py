"""Padded training steps as graphs capture them: the same losses and gradients as the batch itself gives.

On the CPU the padded step runs as it is; on a GPU, captured (tests/gpu/test_fast_body.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.base.load import load_base
from luthier.engine.graphs import StepGraph, bucket_of
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.slot import Slot
from luthier.engine.step import train_step
from luthier.types import AdapterSpec, Example

MakeExamples = Callable[..., list[Example]]


def gradients(slots: list[Slot]) -> list[torch.Tensor]:
    found = []
    for slot in slots:
        assert slot.flat is not None
        found.append(slot.flat.grad_Z.clone())
        slot.flat.grad_Z.zero_()
    return found


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_padded_step_equals_the_step(tiny_llama: Path, make_examples: MakeExamples, num_slots: int) -> None:
    base = load_base(tiny_llama, dtype="float64", wants_fast_body=True)
    assert base.fast_body is not None
    specs = [AdapterSpec(rank=4), AdapterSpec(rank=2, targets=("o_proj",)), AdapterSpec(rank=17, targets=("q_proj",))]
    slots = [base.bank.add(spec, seed) for seed, spec in enumerate(specs[:num_slots])]
    for slot in slots:
        with torch.no_grad():
            for parameter in slot.parameters().values():
                parameter += 0.1
    graph = None
    for seed in range(3):  # later batches meet what earlier ones have left in the padded memory
        items = [PackItem(e, s.index) for i, s in enumerate(slots) for e in make_examples(2 + i, seed + i)]
        items += [PackItem(example, BASE_SLOT) for example in make_examples(1, 7)]
        batch = pack(items)
        weights = {segment.slot: 3.0 + segment.slot for segment in batch.target_segments}
        expected_reports = train_step(base, batch, weights)
        expected = gradients(slots)
        routing = base.routing(batch, training=True)
        found = base.fast_body.slots_for(routing)
        assert found is not None
        bucket = bucket_of(batch, found[1])
        assert bucket.num_tokens >= batch.num_tokens
        assert bucket.num_sequences > batch.num_sequences
        if graph is None or graph.bucket != bucket:
            graph = StepGraph(base.fast_body, bucket, base.device)
        denominators = torch.tensor([weights[batch.slots[row]] for row in batch.target_rows_P])
        with base.bank.routed(routing):
            scores = graph.run(batch, batch.target_weight_P / denominators, *found)
        for one, other in zip(gradients(slots), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        sums = (scores.nll_P * batch.target_weight_P).sum()
        assert float(sums) == pytest.approx(sum(report.nll_sum for report in expected_reports.values()), rel=1e-6)


def test_one_bucket_serves_many_batches(tiny_llama: Path, make_examples: MakeExamples) -> None:
    base = load_base(tiny_llama, dtype="float64", wants_fast_body=True)
    slots = [base.bank.add(AdapterSpec(rank=rank), rank) for rank in (3, 16, 17)]

    def bucket(slot: Slot, num: int, longest: int) -> object:
        assert base.fast_body is not None
        batch = pack([PackItem(example, slot.index) for example in make_examples(num, 0, longest=longest)])
        found = base.fast_body.slots_for(base.routing(batch, training=True))
        assert found is not None
        return bucket_of(batch, found[1])

    assert bucket(slots[0], 2, 20) == bucket(slots[1], 4, 30)
    assert bucket(slots[0], 2, 20) != bucket(slots[2], 2, 20)  # another padded rank
    assert bucket(slots[0], 2, 20) != bucket(slots[0], 20, 40)
