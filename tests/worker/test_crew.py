"""The processes of one training are watched: the end of one is the end of all, and its reason is what is told."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.distributed import torch_ranks
from luthier.errors import DataError, LuthierError, ProcessLostError, RecipeError, RunError
from luthier.recipe import Recipe, load_recipe
from luthier.worker.launch import crew
from luthier.worker.launch.crew import run_crew
from luthier.worker.launch.fake import FakeLauncher, FakeRank
from luthier.worker.launch.place import RankPlace, place_of_process
from luthier.worker.messages import error_message
from luthier.worker.progress import SilentProgress
from luthier.worker.team import Team, check_together, device_at, num_devices
from luthier.worker.train import train_launched

RESULT = {"status": "done", "evaluation": {"num_rows": 2}, "result": {"num_processes": 2}}
LOST = error_message(ProcessLostError("rank 0 has lost the other processes: closed", fix="see the others"))


class Listener(SilentProgress):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def step(self, *given: Any) -> None:
        self.heard.append(given)

    def note(self, message: str, level: Any = "info") -> None:
        self.heard.append((level, message))


@pytest.fixture(autouse=True)
def _in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL_SECONDS", 0.005), ("LAST_WORDS_SECONDS", 0.05), ("END_SECONDS", 0.1)):
        monkeypatch.setattr(crew, name, seconds)


def results(*values: dict[str, Any]) -> dict[str, Any]:
    return {"verb": "results", "results": list(values)}


def run(*ranks: FakeRank) -> list[dict[str, Any]]:
    try:
        return run_crew(FakeLauncher(ranks), {"recipes": []}, len(ranks), SilentProgress())
    finally:
        assert all(rank.has_ended and rank.is_closed for rank in ranks)


def test_the_firsts_results_count_and_all_are_heard() -> None:
    step = {"verb": "step", "arguments": ["run", 1, 2.0, 30.0, 0.1]}
    note = {"verb": "note", "arguments": ["rank 1: memory ran out", "warning"]}
    ranks = [FakeRank([step, results(RESULT)], 0.1), FakeRank([note, results({})])]
    listener = Listener()
    assert run_crew(FakeLauncher(ranks), {}, 2, listener) == [RESULT]
    assert set(listener.heard) == {("run", 1, 2.0, 30.0, 0.1), ("warning", "rank 1: memory ran out")}
    assert not any(rank.was_stopped or rank.was_killed for rank in ranks)


def test_what_the_first_could_say_is_raised_as_it_is() -> None:
    refused = DataError("1 row cannot be trained on", "rows", "mend it")
    with pytest.raises(DataError) as told:
        run(FakeRank([error_message(refused)], 0.02), FakeRank([LOST]))
    assert told.value.message == refused.message


def test_what_another_says_names_it() -> None:
    with pytest.raises(RunError, match="rank 1 of 2 ended the training: no memory"):
        run(FakeRank([LOST]), FakeRank([error_message(RunError("no memory"))], 0.02))


def test_a_killed_rank_is_named_rather_than_who_lost_it() -> None:
    killed = FakeRank(after_seconds=0.03, dies="its process was killed by signal 9")
    with pytest.raises(ProcessLostError, match="rank 2 of 3 ended the training: its process was killed by signal 9"):
        run(FakeRank([LOST], 0.01), FakeRank(after_seconds=None), killed)


def test_one_that_does_not_end_is_killed_soon() -> None:
    deaf = FakeRank(after_seconds=None, heeds_stop=False)
    started = time.monotonic()
    with pytest.raises(ProcessLostError, match="rank 0 of 2"):
        run(FakeRank(after_seconds=0.0), deaf)
    assert deaf.was_killed
    assert time.monotonic() - started < 30.0


def test_ctrl_c_lets_all_save() -> None:
    class Impatient(SilentProgress):
        def step(self, *given: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    step = {"verb": "step", "arguments": ["run", 1, 2.0, 30.0, 0.1]}
    ranks = [FakeRank([step], after_seconds=None), FakeRank(after_seconds=None)]
    with pytest.raises(KeyboardInterrupt):
        run_crew(FakeLauncher(ranks), {"recipes": []}, len(ranks), Impatient())
    assert all(rank.is_closed for rank in ranks)
    assert [rank.was_stopped for rank in ranks] == [True, True]
    assert not any(rank.was_killed for rank in ranks)


def test_one_that_was_stopped_by_somebody_else_is_an_interruption() -> None:
    interrupted = {"verb": "interrupted"}
    with pytest.raises(KeyboardInterrupt):
        run(FakeRank([interrupted]), FakeRank([interrupted]))


# -- what is started, and refused before


def recipe_with(base: Path, folder: Path, method: str = "lora", name: str = "run", **compute: Any) -> Recipe:
    values = {"base": str(base), "data": {"train": "rows.jsonl"}, "method": method, "output": str(folder / name)}
    return load_recipe(values | {"compute": {"device": "cpu", "devices": 2} | compute})


def test_the_order_holds_the_recipes_and_results_come_back(tiny_llama: Path, tmp_path: Path) -> None:
    recipes = [recipe_with(tiny_llama, tmp_path, name=name) for name in ("a", "b")]
    launcher = FakeLauncher([FakeRank([results(RESULT, RESULT | {"status": "failed"})]), FakeRank([results()])])
    found = train_launched(recipes, launcher, resume=True, progress=SilentProgress())
    assert [(result.folder, result.status) for result in found] == [
        (tmp_path / "a", "done"),
        (tmp_path / "b", "failed"),
    ]
    assert launcher.order["resume"] is True
    assert [load_recipe(values) for values in launcher.order["recipes"]] == recipes


def test_what_cannot_share_processes_is_refused_before_any_starts(tiny_llama: Path, tmp_path: Path) -> None:
    full, lora = recipe_with(tiny_llama, tmp_path, "full"), recipe_with(tiny_llama, tmp_path, name="b")
    three = recipe_with(tiny_llama, tmp_path, name="c", devices=3)
    launcher = FakeLauncher([])
    for recipes, words in (([full, lora], "owns its base"), ([lora, three], "different compute.devices: ")):
        with pytest.raises(RecipeError, match=words):
            train_launched(recipes, launcher, resume=False, progress=SilentProgress())
    check_together([full])
    assert num_devices([recipe_with(tiny_llama, tmp_path, devices="auto")]) == 1
    assert launcher.order == {}


def test_the_state_says_who_died_and_keeps_the_trace_of_a_kill(tiny_llama: Path, tmp_path: Path) -> None:
    from luthier.worker.run_folder import RunFolder

    recipe = recipe_with(tiny_llama, tmp_path)
    folder = RunFolder.create(recipe)
    folder.set_state("training", training={"forward_tokens": 64})
    with pytest.raises(ProcessLostError):
        train_launched([recipe], FakeLauncher([FakeRank(), FakeRank()]), resume=True, progress=SilentProgress())
    state = folder.state()
    assert state["status"] == "failed"
    assert state["problem"].startswith("rank 0 of 2")
    assert state["training"] == {"forward_tokens": 64}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("deepspeed", "none.json", "is not there"),
        ("zero", 4, "0, 1, 2 or 3"),
        ("devices", 0, "a number of processes is 1 or more"),
        ("devices", "many", "found 'many'; a number of processes"),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(tmp_path: Path, field: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as told:
        recipe_with(tmp_path, tmp_path, **{field: value})
    assert f"compute.{field}" in told.value.message


# -- meeting


def test_nobody_where_the_ranks_meet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ranks, "MEETING", timedelta(seconds=1))
    with (
        pytest.raises(ProcessLostError, match="rank 1 has lost the other processes"),
        torch_ranks.connected(1, 2, "tcp://127.0.0.1:9", torch.device("cpu")),
    ):
        pass


# -- places


def test_a_place_is_read_from_torchruns_variables() -> None:
    assert place_of_process({}) is None
    assert place_of_process({"RANK": "0", "WORLD_SIZE": "2"}) is None  # nowhere to meet
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **meeting}
    assert place_of_process(given) == RankPlace(5, 8, 1, 4, "env://")
    assert place_of_process({"RANK": "1", "WORLD_SIZE": "2", **meeting}) == RankPlace(1, 2, 1, 2, "env://")
    for broken in ({"RANK": "8"}, {"RANK": "x"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "0"}):
        with pytest.raises(LuthierError, match="no place among others"):
            place_of_process(given | broken)


def test_processes_share_a_machines_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device_at("cuda", RankPlace(3, 4, 1, 2)) == "cuda:1"
    assert device_at("cpu", RankPlace(3, 4, 1, 2)) == "cpu"
    assert device_at("cuda:1", RankPlace()) == "cuda:1"
    with pytest.raises(RecipeError, match=r"compute\.device is cuda:0, and 2 processes train"):
        device_at("cuda:0", RankPlace(0, 2, 0, 2))
    with pytest.raises(RecipeError, match="torch sees 2 CUDA devices"):
        device_at("cuda", RankPlace(0, 3, 0, 3))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert Team(RankPlace(0, 4, 0, 4)).threads(None) == 2
    assert Team(RankPlace(0, 4, 0, 4)).threads(3) == 3
    assert Team(RankPlace(0, 16, 0, 16)).threads(None) == 1
    assert Team().threads(None) is None
