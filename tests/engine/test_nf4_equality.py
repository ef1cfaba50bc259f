"""QLoRA's training and logits equal those of peft over bitsandbytes' own layers, step for step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nf4_models import peft_over_nf4
from slots import distance, model_logits, random_sequences, slot_logits, stirred

from engine.conftest import adapter_of, run_all
from engine.test_peft_equality import LM, PAD, TRAIN, trained_by_peft, usual_loop
from luthier.base.load import load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_loss_curve_and_the_adapter_equal_pefts(
    folder: Path, method: str, make_examples: MakeExamples, tmp_path: Path
) -> None:
    """Losses to 1e-4 relative, each tensor's change to 2e-3: float32's tolerances without quantization."""
    spec = AdapterSpec(method=method, rank=4, alpha=8.0)
    examples = make_examples(22, 0)
    base = load_base(folder, quantization="nf4")
    slot = base.bank.add(spec, seed=3)
    write_adapter(slot, base, tmp_path, base_name=str(folder), pad_token_id=PAD)
    fresh = {name: p.detach().clone() for name, p in slot.parameters().items()}
    job = TrainingJob("job", slot, examples, TRAIN)
    batches = [[examples[int(i)] for i in job.batch_indices(step)] for step in range(job.total_steps)]
    engine = Engine(base)
    engine.add(job)
    reports = run_all(engine)["job"]
    model = peft_over_nf4(folder, tmp_path)
    losses, norms = usual_loop(model, batches, TRAIN)
    assert len(losses) == 12
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-4)
    assert [report.grad_norm for report in reports] == pytest.approx(norms, rel=1e-3)
    assert abs(losses[-1] - losses[0]) > 0.01
    theirs = {name.replace("vector.weight", "vector"): p for name, p in trained_by_peft(model).items()}
    ours = slot.parameters()
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        change = float((parameter - fresh[name]).detach().norm())
        assert float((parameter - theirs[name]).detach().norm()) <= 2e-3 * change, name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_computes_the_slots_logits(folder: Path, method: str, tmp_path: Path) -> None:
    base = load_base(folder, quantization="nf4")
    slot = stirred(base, AdapterSpec(method=method, rank=3, alpha=6.0))
    write_adapter(slot, base, tmp_path, base_name=str(folder))
    sequences = random_sequences((3, 17, 30), 300)
    theirs = model_logits(peft_over_nf4(folder, tmp_path), sequences, classifies=False)
    assert distance(slot_logits(base, slot, sequences), theirs) < 1e-4


def test_the_fused_node_equals_the_plain_reference(folder: Path, make_examples: MakeExamples) -> None:
    curves = []
    for use_reference in (False, True):
        base = load_base(folder, quantization="nf4", use_reference=use_reference)
        engine = Engine(base)
        job = TrainingJob("job", base.bank.add(LM, seed=3), make_examples(12, 1), TRAIN)
        engine.add(job)
        curves.append(([report.loss for report in run_all(engine)["job"]], adapter_of(job)))
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-4)


def test_jobs_share_it_as_they_do_alone_and_it_never_changes(folder: Path, make_examples: MakeExamples) -> None:
    """lora, dora and ia3 in one batch over NF4; losses as alone, and the base's bytes as they were."""
    methods = ("lora", "dora", "ia3")

    def job_of(method: str, base_of: Engine) -> TrainingJob:
        spec = AdapterSpec(method=method, rank=2, targets="default" if method == "ia3" else "all-linear")
        slot = base_of.base.bank.add(spec, seed=methods.index(method))
        train = TrainSpec(epochs=2, batch_size=4, learning_rate=5e-3, seed=methods.index(method))
        return TrainingJob(method, slot, make_examples(9, methods.index(method)), train)

    together = Engine(load_base(folder, quantization="nf4"))
    weights = {n: (w.packed.clone(), w.state.absmax.clone()) for n, w in together.base.nf4_weights.items()}
    for method in methods:
        together.add(job_of(method, together))
    curves = run_all(together)
    for name, (packed, scales) in weights.items():
        assert torch.equal(together.base.nf4_weights[name].packed, packed)
        assert torch.equal(together.base.nf4_weights[name].state.absmax, scales)
    for method in methods:
        alone = Engine(load_base(folder, quantization="nf4"))
        alone.add(job_of(method, alone))
        expected = [report.loss for report in run_all(alone)[method]]
        assert [report.loss for report in curves[method]] == pytest.approx(expected, rel=1e-4)


def test_recomputing_activations_changes_nothing(folder: Path, make_examples: MakeExamples) -> None:
    losses = []
    for checkpointing in (False, True):
        base = load_base(folder, quantization="nf4")
        base.set_checkpointing(checkpointing)
        engine = Engine(base)
        engine.add(TrainingJob("job", base.bank.add(LM, seed=3), make_examples(12, 1), TRAIN))
        losses.append([report.loss for report in run_all(engine)["job"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
