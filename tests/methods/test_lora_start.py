"""PiSSA's and OLoRA's starts, over a base that is never rewritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slots import distance, sequences_for, slot_logits
from torch import nn

from luthier.base.load import load_base
from luthier.checkpoints.peft_format import load_values, slot_from_adapter, write_adapter
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.errors import RecipeError
from luthier.methods.lora import layer as module
from luthier.methods.lora.layer import LORA
from luthier.methods.lora.start import principal_factors
from luthier.ops.base_linear import BaseLinear
from luthier.types import AdapterSpec, Example, TrainSpec

INITS = ("pissa", "olora")


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_a_fresh_slot_says_what_the_base_says(init: str, rank_stabilized: bool, tiny_llama: Path) -> None:
    base = load_base(tiny_llama, dtype="float64")
    spec = AdapterSpec(rank=4, init=init, rank_stabilized=rank_stabilized)  # type: ignore[arg-type]
    slot, plain = base.bank.add(spec, 0), base.bank.add(AdapterSpec(targets=()), 0)
    sequences = sequences_for(spec)
    assert distance(slot_logits(base, slot, sequences), slot_logits(base, plain, sequences)) < 1e-12
    for name, adapter in slot.adapters.items():  # though its factors are a good part of the weight
        [trained, _] = adapter.terms(base.bank.layer(name)).low_rank
        part_OI = trained[2] * (trained[1] @ trained[0]).detach()
        assert float(part_OI.norm() / base.bank.layer(name).weight_OI.norm()) > 0.1


def test_pissa_takes_the_best_part_of_its_rank() -> None:
    weight_OI = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a_RI, b_OR = principal_factors(weight_OI, "pissa", 4, scale=2.0)
    values_M = torch.linalg.svdvals(weight_OI)
    rest = (weight_OI - 2.0 * b_OR @ a_RI).norm()
    torch.testing.assert_close(rest, values_M[4:].norm())
    torch.testing.assert_close(a_RI.norm(dim=1), b_OR.norm(dim=0))  # the values are shared out evenly


@pytest.mark.parametrize("init", INITS)
def test_it_is_saved_as_twice_the_rank_and_resumed_without_decomposing(
    init: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(tiny_llama)
    spec = AdapterSpec(rank=3, alpha=6.0, init=init)  # type: ignore[arg-type]
    slot = base.bank.add(spec, 0)
    with torch.no_grad():
        for parameter in slot.parameters().values():
            parameter += 0.01
    write_adapter(slot, base, tmp_path, base_name="base")
    plain = slot_from_adapter(base, tmp_path)
    assert (plain.spec.rank, plain.spec.alpha, plain.spec.init) == (6, 12.0, "default")

    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(module, "principal_factors", refuse)
    again = base.bank.add(spec, 0, fresh=False)
    load_values(again, base, tmp_path)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in slot.tensors().items())
    assert all(torch.equal(one, other) for one, other in zip(slot.constants(), again.constants(), strict=True))


def test_a_quantized_layer_is_refused() -> None:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RecipeError, match="q_proj is quantized") as caught:
        LORA.create(AdapterSpec(rank=2, init="pissa"), "q_proj", BaseLinear(linear), torch.Generator())
    assert "method.init: default" in caught.value.fix


def train_here(folder: Path, spec: AdapterSpec, examples: list[Example], dtype: str) -> tuple[TrainingJob, list[float]]:
    engine = Engine(load_base(folder, dtype=dtype))
    job = TrainingJob("job", engine.base.bank.add(spec, 0), examples, TRAIN)
    engine.add(job)
    losses = []
    while engine.has_work:
        losses += [report.loss for report in engine.step()]
    return job, losses


TRAIN = TrainSpec(epochs=2, batch_size=6, learning_rate=2e-3, micro_batch_tokens=70)


@pytest.mark.parametrize("init", INITS)
def test_the_curve_and_the_factors_are_pefts(
    init: str, tiny_llama: Path, make_examples: Callable[..., list[Example]]
) -> None:
    """peft rewrites the base and trains its own start; here the base stays, and the start is taken out a slot."""
    from engine.test_peft_equality import trained_by_peft, usual_loop
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    examples = make_examples(18, 0)
    spec = AdapterSpec(rank=4, alpha=8.0, init=init)  # type: ignore[arg-type]
    job, losses = train_here(tiny_llama, spec, examples, "float32")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=init,
        task_type="CAUSAL_LM",  # type: ignore
    )
    theirs = get_peft_model(model, config)
    start = {name: parameter.detach().clone() for name, parameter in trained_by_peft(theirs).items()}
    batches = [[examples[int(i)] for i in job.batch_indices(step)] for step in range(job.total_steps)]
    their_losses, _ = usual_loop(theirs.train(), batches, TRAIN)
    assert losses == pytest.approx(their_losses, rel=1e-4)
    assert abs(losses[0] - losses[-1]) > 0.05
    found = trained_by_peft(theirs)
    assert found.keys() == job.slot.parameters().keys()
    for name, parameter in job.slot.parameters().items():
        change = float((parameter.detach() - start[name]).norm())
        assert change > 0
        assert float((parameter - found[name]).detach().norm()) <= 5e-3 * change, name
