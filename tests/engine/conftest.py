"""Bases and jobs for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import make_pairs, referenced
from torch import Tensor

from luthier.base.load import Base, load_base
from luthier.engine.engine import Engine
from luthier.engine.job import StepReport, TrainingJob
from luthier.types import NO_CLASS, AdapterSpec, Example, TrainSpec

ARCHITECTURES = ("tiny_llama", "tiny_phi3")


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest) -> Path:
    """Each architecture that every identity is shown on: Llama, and Phi-3 with LongRoPE and a sliding window."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def base(folder: Path) -> Base:
    """A fresh float64 base. It runs packed: were it to fall back to padding, nothing here would test packing."""
    base = load_base(folder, dtype="float64")
    assert base.is_packed, base.packing_problem
    return base


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `widen_norms`."""
    widen_norms(monkeypatch)


def widen_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms in float64 where the input is: by themselves they round to float32, whatever the input."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

    def forward(norm: Any, hidden: Tensor) -> Tensor:
        wide = hidden.double()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * normal.to(hidden.dtype)

    for kind in (LlamaRMSNorm, Phi3RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Example]]:
    return random_examples


def random_examples(
    num: int, seed: int, *, longest: int = 44, classes: int = 0, head: str = "sequence"
) -> list[Example]:
    """Random examples, some longer than the sliding window (24) and than LongRoPE's short class (32).

    With `classes` each has one, or with a token head a tag at some of its tokens, the last included,
    or with a multilabel head any number of them.
    """
    random = np.random.default_rng(seed)
    examples = []
    for row in range(num):
        length = int(random.integers(3, longest))
        tokens = random.integers(4, 250, size=length).astype(np.int32)
        weights = np.zeros(length, dtype=np.float32)
        if not classes:
            weights[random.integers(1, length) :] = 1.0
        if head == "token":
            tags = random.integers(classes, size=length).astype(np.int32)
            tags[:-1][random.random(length - 1) < 0.5] = NO_CLASS
            examples.append(Example(tokens, weights, row=row, tags=tags))
            continue
        if head == "multilabel":
            flags = random.integers(2, size=classes).astype(np.uint8)
            examples.append(Example(tokens, weights, row=row, class_flags=flags))
            continue
        examples.append(Example(tokens, weights, int(random.integers(classes)) if classes else -1, row))
    return examples


KINDS = {
    0: AdapterSpec(rank=4, alpha=8.0),
    1: AdapterSpec(rank=2, alpha=16.0, rank_stabilized=True, targets=("o_proj",)),
    2: AdapterSpec(rank=8, alpha=8.0, dropout=0.2),
    3: AdapterSpec(rank=3, alpha=6.0, targets=("o_proj", "down_proj"), num_classes=5),
    4: AdapterSpec(method="dora", rank=4, alpha=8.0),
    5: AdapterSpec(method="dora", rank=2, alpha=4.0, rank_stabilized=True, dropout=0.2, lora_plus_ratio=4.0),
    6: AdapterSpec(method="ia3", targets="default"),
    7: AdapterSpec(rank=3, alpha=6.0, init="pissa", lora_plus_ratio=2.0),
    8: AdapterSpec(rank=3, alpha=6.0, targets=("o_proj", "down_proj"), num_classes=5, head="token"),
    9: AdapterSpec(rank=4, alpha=8.0),
    10: AdapterSpec(rank=2, alpha=4.0, targets=("o_proj", "down_proj"), num_classes=4, head="multilabel"),
}
"""Quite different slots: every method, with and without dropout, on all layers and on some, with each kind of head."""

PREFERENCE = 9
"""The job that learns from pairs."""

UNDROPPED = [kind for kind, spec in KINDS.items() if spec.dropout == 0]
"""Together they take the fused path."""


def spec_of(kind: int) -> AdapterSpec:
    return KINDS[kind]


def train_of(kind: int) -> TrainSpec:
    return [
        TrainSpec(epochs=2, batch_size=4, learning_rate=5e-3, weight_decay=0.1, seed=1),
        TrainSpec(epochs=1, batch_size=1, learning_rate=1e-2, schedule="linear", seed=2, max_grad_norm=0.0),
        TrainSpec(epochs=2, batch_size=3, learning_rate=3e-3, micro_batch_tokens=64, seed=3),
        TrainSpec(epochs=2, batch_size=5, learning_rate=1e-2, schedule="constant", seed=4, warmup_steps=2),
        TrainSpec(epochs=2, batch_size=4, learning_rate=5e-3, weight_decay=0.1, micro_batch_tokens=64, seed=5),
        TrainSpec(epochs=1, batch_size=3, learning_rate=3e-3, seed=6),
        TrainSpec(epochs=2, batch_size=4, learning_rate=2e-2, weight_decay=0.1, seed=7),
        TrainSpec(epochs=1, batch_size=4, learning_rate=3e-3, seed=8),
        TrainSpec(epochs=2, batch_size=5, learning_rate=1e-2, micro_batch_tokens=64, weight_decay=0.1, seed=9),
        # Gradients of pairs are differences, whose rounding Adam magnifies: a smaller rate keeps float32 within bounds.
        TrainSpec(epochs=2, batch_size=4, learning_rate=1e-3, micro_batch_tokens=150, weight_decay=0.1, seed=10),
        TrainSpec(epochs=2, batch_size=4, learning_rate=1e-2, micro_batch_tokens=64, weight_decay=0.1, seed=11),
    ][kind]


def add_job(engine: Engine, kind: int, make_examples: Callable[..., list[Example]], num: int = 11) -> TrainingJob:
    """Job number `kind`, the same whatever engine it is added to."""
    spec = spec_of(kind)
    slot = engine.base.bank.add(spec, seed=kind)
    examples = make_examples(num, kind, classes=spec.num_classes or 0, head=spec.head)
    if kind == PREFERENCE:
        examples = referenced(engine.base, make_pairs(num, kind))
    job = TrainingJob(f"job-{kind}", slot, examples, train_of(kind))
    engine.add(job)
    return job


def run_all(engine: Engine) -> dict[str, list[StepReport]]:
    """Run every job to its end."""
    curves: dict[str, list[StepReport]] = {}
    while engine.has_work:
        for report in engine.step():
            curves.setdefault(report.job, []).append(report)
    return curves


def adapter_of(job: TrainingJob) -> dict[str, torch.Tensor]:
    """A copy of all that a job has trained."""
    return {name: p.detach().clone() for name, p in job.slot.parameters().items()}
