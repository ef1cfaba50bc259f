"""Predicted memory over a base in NF4 and with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tiny_llama

from engine.test_memory import held_bytes
from luthier.base.load import load_base
from luthier.engine.job import TrainingJob
from luthier.engine.memory import activation_bytes_per_token, plan_memory
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_phi3"])
def test_activations_are_predicted_within_a_fifth(
    architecture: str, dropout: float, request: pytest.FixtureRequest
) -> None:
    """And no dense weight is among them: they are what they are over the base in full precision."""
    folder = request.getfixturevalue(architecture)
    base, plain = load_base(folder, quantization="nf4"), load_base(folder)
    spec = AdapterSpec(rank=4, dropout=dropout)
    slot = base.bank.add(spec, 0)
    predicted = activation_bytes_per_token(base, slot)
    assert predicted == pytest.approx(held_bytes(base, slot, [40] * 12) / 480, rel=0.2)
    assert predicted == pytest.approx(activation_bytes_per_token(plain, plain.bank.add(spec, 0)), rel=0.01)


def test_the_sum_by_hand(tmp_path: Path, make_examples: MakeExamples) -> None:
    folder = write_tiny_llama(tmp_path, hidden_size=128, intermediate_size=512, num_attention_heads=4)

    def planned(optimizer: str, quantization: str | None) -> tuple[int, int, int, int]:
        base = load_base(folder, quantization=quantization)
        spec = TrainSpec(batch_size=4, optimizer=optimizer)  # type: ignore[arg-type]
        job = TrainingJob("a", base.bank.add(AdapterSpec(rank=32), 0), make_examples(9, 0), spec)
        plan = plan_memory(base, [job], budget_tokens=10**6)
        return plan.base, plan.adapters, plan.optimizer, plan.activations

    plain, nf4, small = planned("adamw", None), planned("adamw", "nf4"), planned("adamw_8bit", "nf4")
    linear = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 512)  # values of the two layers' matrices
    assert plain[0] - nf4[0] == pytest.approx((4 - 2 * 0.258) * linear, rel=0.05)
    assert nf4[1:3] == plain[1:3]
    assert nf4[3] - plain[3] == pytest.approx(4 * 128 * 512, abs=600)  # the largest layer, dense for a moment
    assert nf4[2] == 2 * nf4[1]
    # Of the factors, those of 32 x 128 values and more are in 8 bits; the smaller ones, of 32 x 64, are not.
    assert 0.25 < small[2] / nf4[2] < 0.4
