"""The body by fast blocks against the model's own modules: curves and adapters of quite different jobs.

In float64 on the CPU, with norms in float64 on both sides, the blocks' hand-written backward meets autograd's to nine
digits; the kernels that a GPU uses in their place have tests of their own under tests/ops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.conftest import adapter_of, run_all
from luthier.base.load import Base, load_base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.step import score
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]

pytestmark = pytest.mark.usefixtures("wide_norms")

SPECS = {
    "all": AdapterSpec(rank=4, alpha=8.0),
    "one layer": AdapterSpec(rank=2, alpha=16.0, rank_stabilized=True, targets=("o_proj",)),
    "head": AdapterSpec(rank=3, alpha=6.0, targets=("o_proj", "down_proj"), num_classes=5),
    "tokens": AdapterSpec(rank=17, alpha=6.0, new_tokens=(5, 9, 320)),
    "output layer": AdapterSpec(rank=2, alpha=6.0, targets=("lm_head", "down_proj")),
}


def load(folder: Path, *, fast: bool, keep: str = "all", dtype: str = "float64") -> Base:
    base = load_base(folder, dtype=dtype, wants_fast_body=fast)
    assert (base.fast_body is not None) == fast, base.fast_body_problem
    if base.fast_body is not None:
        base.fast_body.keeps = [keep] * base.num_layers  # type: ignore[list-item]
    return base


def train(base: Base, names: list[str], make_examples: MakeExamples) -> tuple[dict[str, list[float]], list[dict]]:
    engine = Engine(base)
    jobs = []
    for seed, name in enumerate(names):
        spec = SPECS[name]
        examples = make_examples(9, seed, classes=spec.num_classes or 0)
        train_spec = TrainSpec(batch_size=4, learning_rate=5e-3, weight_decay=0.1, seed=seed, micro_batch_tokens=70)
        jobs.append(TrainingJob(name, base.bank.add(spec, seed), examples, train_spec))
        engine.add(jobs[-1])
    curves = run_all(engine)
    return {name: [r.loss for r in curve] for name, curve in curves.items()}, [adapter_of(job) for job in jobs]


@pytest.fixture(params=["tiny_llama", "tiny_phi3", "tiny_llama_tied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("keep", ["all", "attention", "input"])
def test_blocks_train_as_the_models_own_modules_do(folder: Path, keep: str, make_examples: MakeExamples) -> None:
    calls = count_calls(fast := load(folder, fast=True, keep=keep))
    names = [name for name in SPECS if not (name == "output layer" and fast.bank.is_tied)]
    curves, adapters = train(fast, names, make_examples)
    assert calls, "the fast body never ran"
    plain_curves, plain_adapters = train(load(folder, fast=False), names, make_examples)
    for name in names:
        np.testing.assert_allclose(curves[name], plain_curves[name], rtol=1e-9)
    for one, other in zip(adapters, plain_adapters, strict=True):
        for tensor in one:
            torch.testing.assert_close(one[tensor], other[tensor], rtol=1e-7, atol=1e-8)


def count_calls(base: Base) -> list[int]:
    calls: list[int] = []
    body = base.fast_body
    assert body is not None
    original = body.forward
    body.forward = lambda batch, *others, **named: calls.append(batch.num_tokens) or original(batch, *others, **named)  # type: ignore
    return calls


def test_a_slot_that_the_blocks_do_not_compute_takes_the_plain_way(folder: Path, make_examples: MakeExamples) -> None:
    base = load(folder, fast=True)
    calls = count_calls(base)
    for spec in (AdapterSpec(rank=2, dropout=0.5), AdapterSpec(rank=2, modules_to_save=("input_layernorm",))):
        slot = base.bank.add(spec, 0)
        job = TrainingJob("a", slot, make_examples(3, 0), TrainSpec(batch_size=2, max_steps=2))
        engine = Engine(base)
        engine.add(job)
        run_all(engine)
        assert job.state == "done"
    assert not calls


def test_scores_and_snapshots(folder: Path, make_examples: MakeExamples) -> None:
    reports = []
    for fast in (True, False):
        base = load(folder, fast=fast)
        slot = base.bank.add(SPECS["all"], 0)
        with torch.no_grad():
            for parameter in slot.parameters().values():
                parameter += 0.1
        twin = base.bank.snapshot(slot)
        assert twin.flat is None
        items = [PackItem(e, s) for s in (BASE_SLOT, slot.index, twin.index) for e in make_examples(2, 1)]
        reports.append([(r.nll_sum, r.num_correct) for r in score(base, pack(items))])
    np.testing.assert_allclose(reports[0], reports[1], rtol=1e-9)
    nll = [report[0] for report in reports[0]]
    assert nll[2:4] == pytest.approx(nll[4:6])
    assert nll[0] != pytest.approx(nll[2], rel=1e-3)


def test_an_unknown_architecture_has_no_fast_body(tiny_qwen3: Path) -> None:
    base = load_base(tiny_qwen3, wants_fast_body=True)
    assert base.fast_body is None
    assert "Qwen3DecoderLayer" in base.fast_body_problem


def test_a_body_that_computes_something_else_is_refused(tiny_llama: Path) -> None:
    """A multiplier that the blocks do not know: the probe sees the difference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    base = Base(model, wants_fast_body=True)
    assert base.fast_body is None
    assert "differ" in base.fast_body_problem
