"""`luthier train` around the training itself: what goes to which stream, exit codes, and the hint after Ctrl-C."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.recipe import Recipe
from luthier.worker.progress import Progress

SCORES = {
    "num_rows": 40,
    "base": {"exact_match": {"value": 0.05, "low": 0.01, "high": 0.16, "rows": 40}},
    "tuned": {"exact_match": {"value": 0.9, "low": 0.77, "high": 0.96, "rows": 40}},
}


@dataclass
class Result:
    """What the command reads of a run's result."""

    folder: Path
    status: str = "done"
    evaluation: dict[str, Any] = field(default_factory=lambda: SCORES)

    has_adapter = True

    @property
    def tuned(self) -> Path:
        return self.folder / "adapter"

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "status": self.status, "loss": float("nan"), "evaluation": self.evaluation}


Train = Callable[[Sequence[Recipe], bool, Progress], list[Result]]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["luthier"])
    Path("recipe.yaml").write_text("data: {train: train.jsonl}\n", encoding="utf-8")
    return "recipe.yaml"


def _train_with(monkeypatch: pytest.MonkeyPatch, behaviour: Train) -> None:
    def train(recipes: Sequence[Recipe], *, resume: bool, progress: Progress) -> list[Result]:
        return behaviour(recipes, resume, progress)

    module = ModuleType("luthier.worker.train")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "luthier.worker.train", module)


def _succeed(recipes: Sequence[Recipe], resume: bool, progress: Progress) -> list[Result]:
    progress.stage("Loading the base")
    progress.note("memory is short", "warning")
    return [Result(Path(recipe.output)) for recipe in recipes]


def test_a_result_is_a_table_and_where_to_find_it(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _train_with(monkeypatch, _succeed)
    done = CliRunner().invoke(app, ["train", recipe])
    assert done.exit_code == 0
    assert "Exact match on 40 held-out rows: 5% → 90%" in done.stdout
    assert "luthier chat runs/first" in done.stdout
    assert "Loading the base" in done.stderr
    assert "Loading the base" not in done.stdout


def test_json_is_alone_on_standard_output_and_valid(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _train_with(monkeypatch, _succeed)
    done = CliRunner().invoke(app, ["train", recipe, "--json"])
    value = json.loads(done.stdout)
    assert value["folder"] == "runs/first"
    assert value["loss"] is None


def test_several_recipes_give_a_list(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _train_with(monkeypatch, _succeed)
    Path("second.yaml").write_text("data: {train: train.jsonl}\noutput: runs/second\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["train", recipe, "second.yaml", "--json"])
    assert [value["folder"] for value in json.loads(done.stdout)] == ["runs/first", "runs/second"]


def test_overrides_and_resume_reach_the_training(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, str, bool]] = []

    def behaviour(recipes: Sequence[Recipe], resume: bool, progress: Progress) -> list[Result]:
        seen.append((recipes[0].train.epochs, recipes[0].output, resume))
        return _succeed(recipes, resume, progress)

    _train_with(monkeypatch, behaviour)
    arguments = ["train", recipe, "--set", "train.epochs=3", "--set", "output=runs/a b", "--resume"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == [(3.0, "runs/a b", True)]


def test_quiet_leaves_warnings_and_the_result(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _train_with(monkeypatch, _succeed)
    done = CliRunner().invoke(app, ["train", recipe, "--quiet"])
    assert done.stderr == "warning: memory is short\n"
    assert "Exact match" in done.stdout


def test_an_interrupt_says_how_to_go_on(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def behaviour(recipes: Sequence[Recipe], resume: bool, progress: Progress) -> list[Result]:
        raise KeyboardInterrupt

    _train_with(monkeypatch, behaviour)
    done = CliRunner().invoke(app, ["train", recipe, "--set", "output=runs/a b"])
    assert done.exit_code == 130
    assert "luthier train recipe.yaml --set 'output=runs/a b' --resume" in done.stderr


def test_a_failed_job_is_exit_code_2_and_the_others_are_still_told(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behaviour(recipes: Sequence[Recipe], resume: bool, progress: Progress) -> list[Result]:
        return [Result(Path("runs/bad"), "failed", {}), Result(Path("runs/good"))]

    _train_with(monkeypatch, behaviour)
    done = CliRunner().invoke(app, ["train", recipe])
    assert done.exit_code == 2
    assert "5% → 90%" in done.stdout
    assert "runs/bad failed" in done.stderr


def test_devices_are_set_for_every_recipe_and_named_in_the_hint(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def interrupted(recipes: Sequence[Recipe], resume: bool, progress: Progress) -> list[Result]:
        seen.extend(recipe.compute.devices for recipe in recipes)
        raise KeyboardInterrupt

    _train_with(monkeypatch, interrupted)
    result = CliRunner().invoke(app, ["train", recipe, "--devices", "3"])
    assert result.exit_code == 130
    assert seen == [3]
    assert "--set compute.devices=3 --resume" in result.stderr
    assert CliRunner().invoke(app, ["train", recipe, "--devices", "0"]).exit_code == 1


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 2)])
def test_of_several_processes_the_first_alone_speaks(
    recipe: str, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)

    def train(recipes: Sequence[Recipe], resume: bool, progress: Progress) -> list[Result]:
        progress.stage("Loading the base")
        return [Result(Path("run"), status)]

    _train_with(monkeypatch, train)
    result = CliRunner().invoke(app, ["train", recipe, "--json"])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "")
