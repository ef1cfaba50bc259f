"""The engine on a CUDA device: packed attention, training and sampling agree with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.conftest import add_job, random_examples, run_all

from luthier.base.load import load_base
from luthier.engine.engine import Engine
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.types import Example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MakeExamples = Callable[..., list[Example]]


@pytest.fixture(params=["tiny_llama", "tiny_phi3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def losses_on(folder: Path, device: str, dtype: str, *, checkpointing: bool = False) -> dict[str, list[float]]:
    base = load_base(folder, device=device, dtype=dtype)
    assert base.is_packed, base.packing_problem
    base.set_checkpointing(checkpointing)
    engine = Engine(base)
    for kind in range(4):
        add_job(engine, kind, random_examples)
    return {name: [report.loss for report in curve] for name, curve in run_all(engine).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_in_float32_trains_as_a_cpu_does(folder: Path, checkpointing: bool) -> None:
    """Dropout included: its masks come from a counter and are the same on both."""
    cpu, gpu = losses_on(folder, "cpu", "float32"), losses_on(folder, "cuda", "float32", checkpointing=checkpointing)
    for name in cpu:
        np.testing.assert_allclose(gpu[name], cpu[name], rtol=1e-3)


def test_a_gpu_in_bfloat16_runs_packed_and_stays_close(folder: Path) -> None:
    exact, low = losses_on(folder, "cpu", "float32"), losses_on(folder, "cuda", "bfloat16")
    for name in exact:
        np.testing.assert_allclose(low[name], exact[name], rtol=3e-2)


def test_greedy_replies_equal_the_cpus(folder: Path) -> None:
    replies = []
    for device in ("cpu", "cuda"):
        base = load_base(folder, device=device)
        sampler = Sampler(base, lambda ids: " ".join(map(str, ids)))
        prompts = [example.tokens for example in random_examples(6, 3)]
        requests = [Request(str(i), t, -1, SamplingParams(max_new_tokens=12)) for i, t in enumerate(prompts)]
        replies.append([list(completion.tokens) for completion in sampler.run(requests)])
    assert replies[0] == replies[1]
