"""A job that was saved and taken up again is the job that never stopped; what is damaged is never used."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import make_pairs, referenced
from safetensors.torch import load_file

from luthier.base.load import Base, load_base
from luthier.checkpoints import checkpoint as module
from luthier.checkpoints.checkpoint import (
    checkpoint_folder,
    damage,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
    step_of,
)
from luthier.checkpoints.peft_format import slot_from_adapter, write_adapter
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.errors import ModelError, RunError, StorageError
from luthier.types import AdapterSpec, Example, TrainSpec

TRAIN = TrainSpec(epochs=2, batch_size=4, micro_batch_tokens=60, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1)
SPECS = {
    "dropout": AdapterSpec(rank=4, alpha=8.0, dropout=0.2),
    "rank stabilized, with a norm and tokens": AdapterSpec(
        rank=3, rank_stabilized=True, targets=("o_proj",), modules_to_save=("norm",), new_tokens=(320, 5, 9)
    ),
    "classes and tokens": AdapterSpec(rank=2, num_classes=3, new_tokens=(9, 5)),
    "preference pairs": AdapterSpec(rank=5, alpha=10.0, dropout=0.1),
}


def make_examples(num: int, spec: AdapterSpec) -> list[Example]:
    random = np.random.default_rng(7)
    examples = []
    for row in range(num):
        tokens = random.integers(0, 300, size=int(random.integers(3, 40))).astype(np.int32)
        tokens[1] = random.choice(spec.new_tokens or (5,))
        weights = np.full(len(tokens), 0.0 if spec.num_classes else 1.0, dtype=np.float32)
        weights[0] = 0.0
        examples.append(Example(tokens, weights, row % spec.num_classes if spec.num_classes else -1, row))
    return examples


def make_job(base: Base, spec: AdapterSpec, train: TrainSpec = TRAIN) -> TrainingJob:
    is_of_pairs = spec == SPECS["preference pairs"]
    # The reference is asked anew each time, as a job does that is taken up elsewhere.
    examples = referenced(base, make_pairs(12, 7)) if is_of_pairs else make_examples(12, spec)
    return TrainingJob("job", base.bank.add(spec, train.seed), examples, train)


def run(base: Base, job: TrainingJob, num_steps: int | None = None) -> list[float]:
    """Train to the end, or for some steps; the losses."""
    engine = Engine(base)
    engine.add(job)
    losses: list[float] = []
    while engine.has_work and (num_steps is None or len(losses) < num_steps):
        losses += [report.loss for report in engine.step()]
    return losses


def save(root: Path, job: TrainingJob, base: Base, **extra: Any) -> Path:
    return save_checkpoint(root, job, base, extra, base_name="some/base")


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_llama_tied", "tiny_phi3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def base(tiny_llama: Path) -> Base:
    return load_base(tiny_llama)


@pytest.fixture
def trained(base: Base, tmp_path: Path) -> TrainingJob:
    """A job with checkpoints of steps 1 and 2 under tmp_path."""
    job = make_job(base, SPECS["dropout"])
    for _ in range(2):
        run(base, job, 1)
        save(tmp_path, job, base)
    return job


@pytest.mark.parametrize("name", SPECS)
def test_a_resumed_job_ends_with_the_bytes_of_one_that_never_stopped(folder: Path, name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    base = load_base(folder)
    whole = make_job(base, spec)
    losses = run(base, whole)
    write_adapter(whole.slot, base, tmp_path / "whole", base_name="some/base")
    assert whole.total_steps == len(losses) == 6
    for stop in (1, 4):
        first_base = load_base(folder)
        first = make_job(first_base, spec)
        before = run(first_base, first, stop)
        saved = save(tmp_path / f"stop-{stop}", first, first_base, note="kept")
        assert saved == checkpoint_folder(tmp_path / f"stop-{stop}", stop)
        second_base = load_base(folder)
        second = make_job(second_base, spec)
        assert load_checkpoint(saved, second, second_base) == {"note": "kept"}
        assert (second.step, second.num_tokens_done) == (stop, first.num_tokens_done)
        assert before + run(second_base, second) == losses
        assert second.state == "done"
        write_adapter(second.slot, second_base, tmp_path / f"end-{stop}", base_name="some/base")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / f"end-{stop}" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        moments, expected = second.optimizer.state(), whole.optimizer.state()
        assert moments.keys() == expected.keys()
        assert all(torch.equal(moments[key], expected[key]) for key in expected)


def test_a_checkpoint_is_an_adapter_to_the_bit(base: Base, trained: TrainingJob, tmp_path: Path) -> None:
    tensors = load_file(checkpoint_folder(tmp_path, 2) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    twin = slot_from_adapter(base, checkpoint_folder(tmp_path, 2))
    for parameter, expected in zip(twin.parameters().values(), trained.slot.parameters().values(), strict=True):
        assert torch.equal(parameter, expected)


def test_a_finished_job_stays_finished(base: Base, tmp_path: Path) -> None:
    job = make_job(base, SPECS["dropout"])
    run(base, job)
    again = make_job(base, SPECS["dropout"])
    load_checkpoint(save(tmp_path, job, base), again, base)
    assert again.state == "done"
    assert not again.is_active


def test_a_micro_batch_that_shrank_stays_so(base: Base, tmp_path: Path) -> None:
    job = make_job(base, SPECS["dropout"])
    run(base, job, 1)
    assert job.shrink_micro_batch()
    assert job.micro_batch_tokens < 60
    again = make_job(base, SPECS["dropout"])
    load_checkpoint(save(tmp_path, job, base), again, base)
    assert again.micro_batch_tokens == job.micro_batch_tokens
    assert again.progress_state() == job.progress_state()


def test_a_job_is_saved_only_between_steps(base: Base, tmp_path: Path) -> None:
    job = make_job(base, SPECS["dropout"], replace(TRAIN, micro_batch_tokens=16))
    engine = Engine(base)
    engine.add(job)
    assert engine.step() == []  # one micro-batch of several
    with pytest.raises(ValueError, match="whole steps"):
        save(tmp_path, job, base)
    assert list(tmp_path.iterdir()) == []


# -- refusals


def test_other_settings_are_refused(base: Base, trained: TrainingJob, tmp_path: Path) -> None:
    other = make_job(base, SPECS["dropout"], replace(TRAIN, learning_rate=0.5))
    with pytest.raises(RunError, match=r"learning_rate = 0\.01") as caught:
        load_checkpoint(checkpoint_folder(tmp_path, 2), other, base)
    assert caught.value.expected == "learning_rate = 0.5"


def test_another_base_is_refused(trained: TrainingJob, tiny_llama_bos: Path, tmp_path: Path) -> None:
    from tiny_models import write_tiny_llama

    other = load_base(write_tiny_llama(tmp_path / "other", seed=3))
    with pytest.raises(ModelError, match="another base: weights_hash"):
        load_checkpoint(checkpoint_folder(tmp_path, 2), make_job(other, SPECS["dropout"]), other)


def test_a_slot_of_another_shape_is_refused(base: Base, trained: TrainingJob, tmp_path: Path) -> None:
    job = make_job(base, replace(SPECS["dropout"], rank=2))
    with pytest.raises(ModelError, match="has shape"):
        load_checkpoint(checkpoint_folder(tmp_path, 2), job, base)


def test_another_format_is_refused_and_not_passed_over(base: Base, trained: TrainingJob, tmp_path: Path) -> None:
    path = checkpoint_folder(tmp_path, 2) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(RunError, match="format 99"):
        latest_checkpoint(tmp_path)
    with pytest.raises(RunError, match="format 99"):
        load_checkpoint(checkpoint_folder(tmp_path, 2), trained, base)


# -- damage


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


FILES = ("optimizer.safetensors", "adapter_model.safetensors", "adapter_config.json")


@pytest.mark.parametrize(
    ("file", "spoil"),
    [("state.json", cut_short), ("state.json", os.remove)]
    + [(file, spoil) for file in FILES for spoil in (cut_short, flip_a_bit, os.remove)],
)
def test_a_damaged_checkpoint_is_passed_over(
    trained: TrainingJob, tmp_path: Path, file: str, spoil: Callable[[Path], None]
) -> None:
    newest = checkpoint_folder(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == newest
    assert damage(newest) == ""
    spoil(newest / file)
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append) == checkpoint_folder(tmp_path, 1)
    assert len(said) == 1
    assert str(newest) in said[0]
    assert file in said[0]


def test_nothing_but_damage_is_an_error(trained: TrainingJob, tmp_path: Path) -> None:
    for step in (1, 2):
        cut_short(checkpoint_folder(tmp_path, step) / "state.json")
    with pytest.raises(RunError, match="every checkpoint"):
        latest_checkpoint(tmp_path)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_damaged_checkpoint_gives_way_to_a_new_one_of_its_step(
    base: Base, trained: TrainingJob, tmp_path: Path
) -> None:
    newest = checkpoint_folder(tmp_path, 2)
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    cut_short(newest / "optimizer.safetensors")
    save(tmp_path, trained, base)
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("at", ["write_slot", "write_tensors", "write_text"])
def test_a_save_that_breaks_off_leaves_the_earlier_ones(
    base: Base, trained: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(base, trained, 1)

    def broken(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, at, broken)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, trained, base)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)


def test_what_a_kill_left_half_written_is_ignored_and_swept_up(trained: TrainingJob, tmp_path: Path) -> None:
    newest = checkpoint_folder(tmp_path, 2)
    shutil.copytree(newest, tmp_path / ".step-000003-1234-abcd")
    assert latest_checkpoint(tmp_path) == newest
    prune(tmp_path, keep={2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert step_of(newest) == 2


def test_a_full_disk_is_said_and_harms_nothing(base: Base, trained: TrainingJob, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(base, trained, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # files past 20 kB fail as on a full disk
    try:
        with pytest.raises(StorageError) as caught:
            save(tmp_path, trained, base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{checkpoint_folder(tmp_path, 3)} could not be written" in caught.value.found
    assert "untouched" in caught.value.fix
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert save(tmp_path, trained, base) == latest_checkpoint(tmp_path)  # and once there is room, it goes on


def test_a_disk_without_space_is_named(
    base: Base, trained: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run(base, trained, 1)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        save(tmp_path, trained, base)
    assert "free some space" in caught.value.fix
    assert latest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)
