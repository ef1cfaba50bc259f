"""Jobs on one encoder: company changes nothing, packed equals padded, gradients are peft's, the base stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_encoder
from torch import Tensor

from engine.conftest import adapter_of, random_examples, run_all
from luthier.base.load import Base, load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.checkpoints.peft_names import peft_name
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.pack import PackItem, pack
from luthier.engine.step import train_step
from luthier.errors import RecipeError
from luthier.types import NO_CLASS, AdapterSpec, Example, TrainSpec

ARCHITECTURES = ("bert", "roberta", "distilbert", "modernbert", "mpnet")
SPECS = (
    AdapterSpec(rank=4, alpha=8.0, num_classes=3),
    AdapterSpec(rank=2, alpha=4.0, num_classes=5, head="token"),
    AdapterSpec(rank=3, alpha=6.0, dropout=0.2, num_classes=4, head="multilabel"),
    AdapterSpec(method="dora", rank=2, num_classes=2, head="token"),
)
TRAIN = TrainSpec(epochs=2, batch_size=4, learning_rate=5e-3, weight_decay=0.1, micro_batch_tokens=64)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("models") / request.param, request.param)


def add_job(engine: Engine, number: int) -> TrainingJob:
    spec = SPECS[number]
    slot = engine.base.bank.add(spec, seed=number)
    examples = random_examples(9, number, classes=spec.num_classes or 0, head=spec.head)
    job = TrainingJob(f"job-{number}", slot, examples, TRAIN)
    engine.add(job)
    return job


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def weights_of(base: Base) -> dict[str, Tensor]:
    """The base's own weights, under names without the bank's wrappers."""
    return {name.replace(".base.", "."): p.clone() for name, p in base.model.named_parameters()}


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_a_job_alone_equals_the_same_job_among_others(folder: Path, number: int) -> None:
    alone = Engine(load_base(folder, dtype="float64"))
    lonely = add_job(alone, number)
    lonely_curve = run_all(alone)[lonely.name]
    together = Engine(load_base(folder, dtype="float64"))
    frozen = weights_of(together.base)
    jobs = [add_job(together, other) for other in range(len(SPECS))]
    curve = run_all(together)[lonely.name]
    # ModernBERT rotates queries and keys in float32, whose rounding depends on where a text lies in the batch.
    tolerance = 1e-5 if "modernbert" in folder.name else 1e-9
    np.testing.assert_allclose([r.loss for r in curve], [r.loss for r in lonely_curve], rtol=tolerance)
    assert_close(adapter_of(jobs[number]), adapter_of(lonely), 10 * tolerance)
    assert_close(weights_of(together.base), frozen, 0.0)


def test_a_padded_base_equals_a_packed_one(folder: Path) -> None:
    if folder.name == "mpnet":
        pytest.skip("it runs padded anyway")
    adapters = []
    for is_packed in (True, False):
        engine = Engine(load_base(folder, dtype="float64"))
        assert engine.base.is_packed
        engine.base.is_packed = is_packed
        jobs = [add_job(engine, number) for number in range(len(SPECS))]
        run_all(engine)
        adapters.append({f"{job.name}.{name}": p for job in jobs for name, p in adapter_of(job).items()})
    assert_close(*adapters, tolerance=1e-4 if "modernbert" in folder.name else 1e-8)


def test_recomputing_activations_changes_nothing(folder: Path) -> None:
    adapters = []
    if folder.name == "mpnet":
        with pytest.raises(RecipeError, match="mpnet cannot compute its activations again"):
            load_base(folder).set_checkpointing(True)
        return
    for recomputes in (False, True):
        engine = Engine(load_base(folder, dtype="float64"))
        engine.base.set_checkpointing(recomputes)
        job = add_job(engine, 0)
        run_all(engine)
        adapters.append(adapter_of(job))
    assert_close(*adapters, tolerance=1e-9)


def model_of_peft(base: Base, adapter: Path, spec: AdapterSpec) -> Any:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    loader: Any = AutoModelForTokenClassification if spec.head == "token" else AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(adapter, subfolder="classifier")
    under = loader.from_pretrained(base.folder, config=config, dtype="float64")
    return PeftModel.from_pretrained(under, adapter, is_trainable=True).eval()  # without dropout


def loss_of_transformers(model: Any, examples: list[Example]) -> Tensor:
    """The mean that the classifier itself computes from labels, of one padded batch."""
    longest = max(example.num_tokens for example in examples)
    ids = torch.full((len(examples), longest), model.config.pad_token_id)
    mask = torch.zeros(len(examples), longest, dtype=torch.int64)
    tags = torch.full((len(examples), longest), -100)
    for row, example in enumerate(examples):
        ids[row, : example.num_tokens] = torch.from_numpy(example.tokens.astype(np.int64))
        mask[row, : example.num_tokens] = 1
        if example.tags is not None:
            own = torch.from_numpy(example.tags.astype(np.int64))
            tags[row, : example.num_tokens] = torch.where(own == NO_CLASS, -100, own)
    labels = torch.tensor([example.class_index for example in examples])
    if examples[0].tags is not None:
        labels = tags
    elif examples[0].class_flags is not None:
        labels = torch.tensor(np.stack([e.class_flags for e in examples if e.class_flags is not None])).double()
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


@pytest.mark.parametrize("number", range(3))
def test_loss_and_gradients_are_pefts(folder: Path, number: int, tmp_path: Path) -> None:
    base = load_base(folder, dtype="float64")
    spec = replace(SPECS[number], dropout=0.0)
    slot = base.bank.add(spec, seed=1)
    with torch.no_grad():  # B begins at 0, and with it A's gradient
        for name, parameter in slot.parameters().items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    write_adapter(slot, base, tmp_path, base_name=str(folder))
    examples = random_examples(6, 3, classes=spec.num_classes or 0, head=spec.head)
    model = model_of_peft(base, tmp_path, spec)
    expected = loss_of_transformers(model, examples)
    expected.backward()

    batch = pack([PackItem(example, slot.index) for example in examples])
    weight = sum(int((e.tags != NO_CLASS).sum()) if e.tags is not None else 1 for e in examples)
    report = train_step(base, batch, {slot.index: float(weight)})[slot.index]
    tolerance = 1e-5 if folder.name == "modernbert" else 1e-9
    assert report.nll_sum / report.weight_sum == pytest.approx(float(expected.detach()), rel=tolerance)
    theirs = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    ours = {peft_name(name, base.bank): parameter.grad for name, parameter in slot.parameters().items()}
    assert_close({n: g for n, g in ours.items() if g is not None}, theirs, 10 * tolerance)


def test_a_snapshot_serves_what_was(folder: Path) -> None:
    engine = Engine(load_base(folder, dtype="float64"))
    job = add_job(engine, 0)
    engine.step()
    twin = engine.base.bank.snapshot(job.slot)  # type: ignore[arg-type]
    before = {name: p.clone() for name, p in twin.parameters().items()}
    run_all(engine)
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in twin.parameters().items())
    assert any(not torch.equal(before[name], p) for name, p in job.slot.parameters().items())
