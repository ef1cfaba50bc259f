"""When memory runs short the micro-batch shrinks, the optimizer batch stays, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.conftest import adapter_of, add_job, run_all
from luthier.base.load import Base, load_base
from luthier.engine import engine as module
from luthier.engine.engine import Engine, is_out_of_memory
from luthier.engine.job import TrainingJob
from luthier.engine.pack import PackedBatch
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]
MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


class Room:
    """Stands in for `train_step`: a batch over `most` tokens does not fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException | None = None) -> None:
        self.most, self.error = most, error or RuntimeError(MESSAGE)
        self.sizes: list[int] = []
        self.num_refused = 0
        self._run = module.train_step
        monkeypatch.setattr(module, "train_step", self)

    def __call__(self, base: Base, batch: PackedBatch, denominators: dict[int, float], *others: object) -> object:
        if batch.num_tokens > self.most:
            self.num_refused += 1
            if self.num_refused % 2:  # sometimes halfway, with part of the gradients there
                self._run(base, batch, denominators)
            raise self.error
        self.sizes.append(batch.num_tokens)
        return self._run(base, batch, denominators)


def run(folder: Path, make_examples: MakeExamples, kinds: list[int]) -> tuple[list[TrainingJob], dict]:
    engine = Engine(load_base(folder, dtype="float64"))
    jobs = [add_job(engine, kind, make_examples) for kind in kinds]
    return jobs, run_all(engine)


def assert_same(found: tuple[list[TrainingJob], dict], expected: tuple[list[TrainingJob], dict]) -> None:
    assert found[1].keys() == expected[1].keys()
    for name, curve in found[1].items():
        other = expected[1][name]
        assert [r.loss for r in curve] == pytest.approx([r.loss for r in other], rel=1e-9)
        assert [r.num_tokens for r in curve] == [r.num_tokens for r in other]
    for job, twin in zip(found[0], expected[0], strict=True):
        for name, tensor in adapter_of(job).items():
            torch.testing.assert_close(tensor, adapter_of(twin)[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("error", [RuntimeError(MESSAGE), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
@pytest.mark.parametrize("most", [100, 60, 44])
def test_a_lone_job_goes_on_in_smaller_parts(
    folder: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException
) -> None:
    expected = run(folder, make_examples, [0])
    room = Room(monkeypatch, most, error)
    found = run(folder, make_examples, [0])
    assert_same(found, expected)
    assert room.num_refused > 0
    assert max(room.sizes) <= most
    assert found[0][0].micro_batch_tokens < 4096
    assert sum(room.sizes) >= sum(report.num_tokens for report in found[1]["job-0"])


def test_jobs_part_company_before_their_own_batches_shrink(
    tiny_llama: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tiny_llama, make_examples, [0, 1, 3])
    room = Room(monkeypatch, 250)
    found = run(tiny_llama, make_examples, [0, 1, 3])
    assert_same(found, expected)
    assert room.num_refused > 0
    assert [job.micro_batch_tokens for job in found[0]] == [4096, 4096, 4096]


def test_dropout_draws_the_same_in_smaller_parts(
    tiny_llama: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tiny_llama, make_examples, [2])
    room = Room(monkeypatch, 45)
    assert_same(run(tiny_llama, make_examples, [2]), expected)
    assert room.num_refused > 0


@pytest.mark.parametrize("error", [RuntimeError(MESSAGE), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize("longest", [5, 44])
def test_when_one_sequence_does_not_fit_the_error_surfaces(
    tiny_llama: Path,
    make_examples: MakeExamples,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    longest: int,
) -> None:
    base = load_base(tiny_llama)
    engine = Engine(base)
    spec = TrainSpec(batch_size=6)
    job = TrainingJob("a", base.bank.add(AdapterSpec(rank=2), 0), make_examples(6, 0, longest=longest), spec)
    engine.add(job)
    room = Room(monkeypatch, 2, error)
    with pytest.raises(type(error)):
        run_all(engine)
    assert room.num_refused < 20
    assert job.step == 0
    assert all(p.grad is None or not p.grad.any() for p in job.slot.parameters().values())


def test_another_error_is_not_taken_for_it(
    tiny_llama: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(monkeypatch, 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        run(tiny_llama, make_examples, [0])
    assert room.num_refused == 1


def test_torchs_own_refusal_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
