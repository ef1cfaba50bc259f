"""Several processes train what one does: equal curves and adapters, kills, resumes at other sizes, torchrun.

Each test starts processes, so they are few; what holds between ranks is shown with threads in
`tests/engine/test_rounds.py`, and what watches processes with a fake in `tests/worker/test_crew.py`.

LUTHIER_TEST_RANK_KILLS sets how often a rank is killed in each test that does so, here and in
`tests/worker/test_zero.py`; by default once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
import yaml
from engine.conftest import widen_norms
from processes import children_running, free_port
from safetensors.torch import load_file

import luthier
from luthier.checkpoints.checkpoint import latest_checkpoint, step_of
from luthier.engine.ranks import ALONE
from luthier.errors import ProcessLostError, RunError
from luthier.worker.progress import SilentProgress

WORDS = ["red", "green", "blue", "warm", "cold", "bright", "dim", "lamp", "door", "fan"]
TOLERANCE = 1e-4
"""Of float32, whose sums over two processes are taken in another order."""

NUM_KILLS = int(os.environ.get("LUTHIER_TEST_RANK_KILLS", "1"))
# Long enough that what reaches the other processes late still finds them at work.
NUM_EPOCHS = 4 + 2 * NUM_KILLS
NUM_STEPS = 4 * NUM_EPOCHS


def recipe_for(base: Path, folder: Path, name: str, *, devices: int = 1, method: Any = None, **train: Any) -> dict:
    draw = random.Random(0)
    rows = [draw.sample(WORDS, 3) for _ in range(40)]
    messages = [[("user", " ".join(row)), ("assistant", row[0])] for row in rows]
    lines = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in messages]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "base": str(base),
        "data": {"train": str(data), "validation": 0.2},
        "method": method or {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"epochs": NUM_EPOCHS, "batch_size": 8, "learning_rate": 1e-2, "max_length": 128, **train},
        "evaluation": {"rows": 4, "max_new_tokens": 8},
        "compute": {"device": "cpu", "threads": 1, "devices": devices},
        "output": str(folder / name),
    }


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'luthier[deepspeed]'"
)


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def assert_equal_runs(found: Path, expected: Path) -> None:
    for kind in ("step", "evaluation"):
        ours, theirs = lines_of(found, kind), lines_of(expected, kind)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=TOLERANCE)
    steps = [
        [(line["num_tokens"], line["num_supervised_tokens"]) for line in lines_of(r, "step")] for r in (found, expected)
    ]
    assert steps[0] == steps[1]
    name = "adapter/adapter_model.safetensors"
    name = name if (expected / name).exists() else "model/model.safetensors"
    ours, theirs = load_file(found / name), load_file(expected / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert float((ours[key] - tensor).norm()) <= 10 * TOLERANCE * float(tensor.norm()), key


class At(SilentProgress):
    """Does something once, at a step, or at the first past it of a run that goes on from there."""

    def __init__(self, step: int, act: Any) -> None:
        self._at, self._act, self._is_done = step, act, False

    def step(self, job: str, step: int, *rest: Any) -> None:
        if step >= self._at and not self._is_done:
            self._is_done = True
            self._act()


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill_a_rank() -> None:
    ranks = children_running("luthier.worker.launch.process")
    assert len(ranks) == 2
    random.choice(ranks).kill()


def last_step(run: Path) -> int:
    """Of the last checkpoint; 0 where there is none."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    return step_of(checkpoint) if checkpoint is not None else 0


def kill_and_resume(recipe: dict[str, Any], num_steps: int) -> None:
    """Begin, or go on, and kill a rank at a random one of the next `num_steps` steps; as often as is asked for."""
    first, killed = last_step(Path(recipe["output"])), r"rank [01] of 2 ended the training: its process was killed by"
    for left in range(NUM_KILLS, 0, -1):
        step = last_step(Path(recipe["output"]))
        at = step + random.randint(1, max(1, (first + num_steps - step) // left))
        with pytest.raises(ProcessLostError, match=rf"{killed} signal 9"):
            luthier.train(recipe, resume=True, progress=At(at, kill_a_rank))


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that one process took to its end."""
    folder = tmp_path_factory.mktemp("whole")
    return luthier.train(recipe_for(tiny_llama, folder, "whole")).folder


def test_two_processes_equal_one_in_float64(
    tiny_llama: Path, tiny_phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lora, dora and a sequence head alone, and several jobs of different batch sizes together: to 1e-9."""
    folders, meeting = [str(tiny_llama), str(tiny_phi3)], (tmp_path / "meeting").as_uri()
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, rank_jobs.__file__, str(rank), "2", meeting, str(out), *folders])
        for rank, out in enumerate(outs)
    ]
    widen_norms(monkeypatch)
    expected = rank_jobs.outcomes(tiny_llama, ALONE) | rank_jobs.outcomes(tiny_phi3, ALONE)
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    first, second = (torch.load(out) for out in outs)
    assert first.keys() == second.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(first[name], second[name]), name


def test_recipes_that_share_a_base_share_two_processes(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    first = recipe_for(tiny_llama, tmp_path, "a", devices=2)
    second = recipe_for(
        tiny_llama, tmp_path, "b", devices=2, method={"type": "dora", "rank": 2}, batch_size=1, max_steps=6
    )
    results = luthier.train([first, second])
    assert [result.status for result in results] == ["done", "done"]
    assert [result.result["num_processes"] for result in results] == [2, 2]
    assert_equal_runs(tmp_path / "a", whole)
    evaluation = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert evaluation == results[0].evaluation
    assert evaluation["num_rows"] == 4
    alone = luthier.train(
        recipe_for(tiny_llama, tmp_path, "alone", **{k: second[k] for k in ("method",)}, **second["train"])
    )
    assert_equal_runs(tmp_path / "b", alone.folder)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in whole.iterdir())


def test_ctrl_c_saves_and_one_process_goes_on(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, "run", devices=2)
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe, progress=At(3, press_ctrl_c))
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == "interrupted"
    assert 3 <= state["step"] < NUM_STEPS
    luthier.train(recipe_for(tiny_llama, tmp_path, "run"), resume=True)
    assert_equal_runs(tmp_path / "run", whole)


def test_two_go_on_from_one_and_a_killed_rank_loses_nothing(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe_for(tiny_llama, tmp_path, "run"), progress=At(2, press_ctrl_c))
    recipe = recipe_for(tiny_llama, tmp_path, "run", devices=2)
    kill_and_resume(recipe, NUM_STEPS - 12)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == "failed"
    assert "of 2 ended the training" in state["problem"]
    assert not children_running("luthier.worker.launch.process")
    with pytest.raises(RunError, match="batch_size: was 8, is 4"):
        luthier.train(recipe_for(tiny_llama, tmp_path, "run", batch_size=4), resume=True)
    luthier.train(recipe, resume=True)
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        pytest.param(["deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", "--module"], marks=needs_deepspeed),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers_start_it_as_it_is(launcher: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    """With a method that owns its base."""
    settings = {"method": "full", "learning_rate": 1e-3, "max_steps": 4}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_for(tiny_llama, tmp_path, "two", **settings)))
    name, *flags = launcher
    if name.startswith("deepspeed"):
        flags = ["--master_port", str(free_port()), *flags]
    done = subprocess.run(
        [sys.executable, "-m", name, *flags, "luthier.cli.main", "train", str(file), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["result"]["num_processes"] == 2
    assert printed["status"] == "done"
    one = luthier.train(recipe_for(tiny_llama, tmp_path, "one", **settings))
    assert_equal_runs(tmp_path / "two", one.folder)
