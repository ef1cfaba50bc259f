"""A run that was killed: for want of memory it resumes in halves, and for any other reason as it was."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from worker.test_train import recipe_for, steps_of

import luthier
from luthier.engine import engine as engine_module
from luthier.errors import MemoryShortError
from luthier.worker import killed
from luthier.worker.killed import memory_kills, note_training, tokens_after_kill
from luthier.worker.progress import SilentProgress
from luthier.worker.run_folder import RunFolder

DIES = """
import os, signal, sys
import luthier
from luthier.worker.progress import SilentProgress

class Death(SilentProgress):
    def step(self, job, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

luthier.train(luthier.load_recipe(sys.argv[1]), progress=Death())
"""


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str, level: Any = "info") -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def dead(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a run that died of SIGKILL after three of eight steps; `copied` gives a test one of its own."""
    base, folder = tiny_llama, tmp_path_factory.mktemp("killed")
    settings = {"checkpoint_every": 1, "schedule": "constant"}
    recipe = recipe_for(base, folder, train=settings, evaluation={"rows": 2, "generate": False})
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe))
    done = subprocess.run([sys.executable, "-c", DIES, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    return recipe


def copied(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe of a copy of a run, in another folder."""
    shutil.copytree(recipe["output"], folder / "run")
    return recipe | {"output": str(folder / "run")}


def sizes_of_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    run = engine_module.train_step

    def noted(base: Any, batch: Any, *rest: Any) -> Any:
        sizes.append(batch.num_tokens)
        return run(base, batch, *rest)

    monkeypatch.setattr(engine_module, "train_step", noted)
    return sizes


def test_a_run_that_memory_killed_resumes_at_half_the_tokens(
    dead: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = luthier.train(
        recipe_for(
            tiny_llama,
            tmp_path,
            "whole",
            train={"checkpoint_every": 1, "schedule": "constant"},
            evaluation={"rows": 2, "generate": False},
        )
    )
    recipe = copied(dead, tmp_path)
    before = RunFolder.open(recipe["output"]).state()["training"]["forward_tokens"]
    now = memory_kills()
    monkeypatch.setattr(killed, "memory_kills", lambda: now | {"memory_kills": (now["memory_kills"] or 0) + 1})
    sizes, heard = sizes_of_forwards(monkeypatch), Notes()
    again = luthier.train(recipe, resume=True, progress=heard)
    (sentence,) = [note for note in heard.notes if "was killed" in note]
    assert f"at most {before // 2:,} tokens in a forward" in sentence
    assert max(sizes) <= before // 2
    assert again.result["micro_batch_tokens"] == before // 2
    # The same optimizer batches, and so the same run but for rounding.
    losses = [[step["loss"] for step in steps_of(run.folder)] for run in (again, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [step["num_tokens"] for step in steps_of(again.folder)] == [s["num_tokens"] for s in steps_of(whole.folder)]


@pytest.mark.skipif(memory_kills()["memory_kills"] is None, reason="this system does not count memory kills")
def test_a_run_that_somebody_killed_resumes_as_it_was(dead: dict[str, Any], tmp_path: Path) -> None:
    recipe, heard = copied(dead, tmp_path), Notes()
    again = luthier.train(recipe, resume=True, progress=heard)
    assert [note for note in heard.notes if "was killed, and not for want of memory" in note]
    assert again.result["micro_batch_tokens"] == 4096


def test_an_exclusive_run_whose_process_died_keeps_the_note_for_its_resume(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    note_training(folder, 512, 9)
    killed.mark_killed(folder, "its process was killed by signal 9")
    assert folder.state()["status"] == "failed"
    monkeypatch.setattr(killed, "memory_kills", lambda: {"boot": None, "memory_kills": None})
    tokens, sentence = tokens_after_kill(folder)
    assert tokens == 256
    assert "perhaps for want of memory" in sentence


@pytest.mark.parametrize(
    ("then", "now", "tokens", "said"),
    [
        ({"boot": "a", "memory_kills": 3}, {"boot": "a", "memory_kills": 3}, None, "not for want of memory"),
        ({"boot": "a", "memory_kills": 3}, {"boot": "a", "memory_kills": 4}, 500, ", for want of memory"),
        ({"boot": "a", "memory_kills": 3}, {"boot": "b", "memory_kills": 3}, 500, "perhaps"),
        ({"boot": None, "memory_kills": None}, {"boot": None, "memory_kills": None}, 500, "perhaps"),
    ],
)
def test_what_the_kernel_has_counted_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Any, now: Any, tokens: int | None, said: str
) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(killed, "memory_kills", lambda: then)
    note_training(folder, 1000, 9)
    monkeypatch.setattr(killed, "memory_kills", lambda: now)
    found, sentence = tokens_after_kill(folder)
    assert found == tokens
    assert said in sentence


def test_a_run_that_ended_by_an_error_was_not_killed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tiny_llama, tmp_path)

    def breaks(*given: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(engine_module, "train_step", breaks)
    with pytest.raises(RuntimeError, match="a defect"):
        luthier.train(recipe)
    state = RunFolder.open(recipe["output"]).state()
    assert (state["status"], state["problem"]) == ("failed", "a defect")
    assert tokens_after_kill(RunFolder.open(recipe["output"])) == (None, "")


def test_memory_that_runs_out_in_a_step_halves_the_micro_batch_and_says_so(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"evaluation": {"rows": 2, "generate": False}}
    whole = luthier.train(recipe_for(tiny_llama, tmp_path, "whole", **{k: dict(v) for k, v in settings.items()}))
    run, sizes = engine_module.train_step, []

    def gpu_of_100_tokens(base: Any, batch: Any, *rest: Any) -> Any:
        if batch.num_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(batch.num_tokens)
        return run(base, batch, *rest)

    monkeypatch.setattr(engine_module, "train_step", gpu_of_100_tokens)
    heard = Notes()
    result = luthier.train(recipe_for(tiny_llama, tmp_path, "small", **settings), progress=heard)
    said = [note for note in heard.notes if note.startswith("memory ran out")]
    assert said
    assert f"at most {result.result['micro_batch_tokens']:,} tokens in a forward" in said[-1]
    assert max(sizes) <= 100
    losses = [[step["loss"] for step in steps_of(each.folder)] for each in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_that_would_not_fit_is_refused_before_its_first_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engine import memory

    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**14)
    recipe = recipe_for(tiny_llama, tmp_path)
    with pytest.raises(MemoryShortError, match="are free"):
        luthier.train(recipe)
    assert not (Path(recipe["output"]) / "metrics.jsonl").exists()
