"""The fast body's kernels and captured steps on a CUDA device, against the plain path in float64 on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine.conftest import random_examples, run_all

from luthier.base.load import Base, load_base
from luthier.engine.engine import Engine
from luthier.engine.graphs import StepGraphs
from luthier.engine.job import TrainingJob
from luthier.types import AdapterSpec, TrainSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPECS = [
    AdapterSpec(rank=4, alpha=8.0),
    AdapterSpec(rank=2, alpha=16.0, rank_stabilized=True, targets=("o_proj",)),
    AdapterSpec(rank=32, alpha=8.0, targets=("down_proj", "o_proj")),
]


def train(base: Base, num_steps: int = 20, num_jobs: int = 3) -> tuple[dict[str, np.ndarray], Engine]:
    engine = Engine(base)
    for seed, spec in enumerate(SPECS[:num_jobs]):
        train_spec = TrainSpec(max_steps=num_steps, epochs=100, batch_size=4, learning_rate=2e-3, seed=seed)
        engine.add(TrainingJob(f"job-{seed}", base.bank.add(spec, seed), random_examples(12, seed), train_spec))
    curves = run_all(engine)
    return {name: np.array([report.loss for report in curve]) for name, curve in curves.items()}, engine


@pytest.fixture(params=["tiny_llama", "tiny_phi3", "tiny_llama_tied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("keep", ["all", "attention", "input"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_curves_equal_the_plain_paths(folder: Path, dtype: str, tolerance: float, keep: str) -> None:
    exact, _ = train(load_base(folder, dtype="float64"))
    base = load_base(folder, device="cuda", dtype=dtype)
    assert base.fast_body is not None, base.fast_body_problem
    base.fast_body.keeps = [keep] * base.num_layers  # type: ignore[list-item]
    found, _ = train(base)
    for name in exact:
        np.testing.assert_allclose(found[name], exact[name], rtol=tolerance)


def test_captured_steps_train_as_plain_ones_do(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []
    original = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or original(graph))
    captured, engine = train(load_base(tiny_llama, device="cuda", dtype="bfloat16"), 40)
    assert isinstance(engine._graphs, StepGraphs)
    assert len(replays) >= 10
    monkeypatch.setattr(StepGraphs, "run", lambda *_: None)
    plain, _ = train(load_base(tiny_llama, device="cuda", dtype="bfloat16"), 40)
    for name in plain:
        np.testing.assert_allclose(captured[name], plain[name], rtol=2e-2)
