"""`luthier init`: what it recognizes, what it writes, and what it never overwrites."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.errors import DataError, RecipeError
from luthier.recipe import Recipe, load_recipe


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _write_jsonl(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def _write_csv(name: str, columns: list[str], rows: list[list[str]]) -> str:
    with open(name, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return name


CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 3
LABELLED = [["how late is it", "time"], ["what is the hour", "time"], ["will it rain", "weather"], ["sun?", "weather"]]


def _init(*arguments: str, answers: str = "", recipe: str = "recipe.yaml") -> Recipe:
    result = CliRunner().invoke(app, ["init", *arguments], input=answers)
    if result.exception is not None:
        raise result.exception
    return load_recipe(recipe)


def test_chat_rows_become_a_chat_recipe() -> None:
    recipe = _init("--yes", "--data", _write_jsonl("train.jsonl", CHAT))
    assert recipe.task.type == "chat"
    assert recipe.data.train == "train.jsonl"
    assert recipe.output == "runs/train"
    assert recipe.base == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []},
    ],
)
def test_pairs_become_a_preference_recipe_with_small_steps(row: dict[str, Any]) -> None:
    recipe = _init("--yes", "--data", _write_jsonl("pairs.jsonl", [row] * 3))
    assert (recipe.task.type, recipe.data.format, recipe.data.fields) == ("preference", "auto", {})
    assert recipe.train.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("columns", "task", "fields"),
    [
        (["text", "label"], "classification", {}),
        (["query", "intent"], "classification", {"text": "query", "label": "intent"}),
        (["utterance", "kind"], "classification", {"text": "utterance", "label": "kind"}),
    ],
)
def test_labelled_texts_become_a_classification_recipe(columns: list[str], task: str, fields: dict[str, str]) -> None:
    recipe = _init("--yes", "--data", _write_csv("rows.csv", columns, LABELLED))
    assert recipe.task.type == task
    assert recipe.data.fields == fields


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_lists_of_labels_become_a_recipe_of_several_a_text(column: str, ending: str) -> None:
    lists = [["wet", "dark"], [], ["wet"], ["dark"], ["wet", "dark"], ["dark"]]
    if ending == "jsonl":
        name = _write_jsonl("rows.jsonl", [{"text": f"room {n}", column: found} for n, found in enumerate(lists)])
    else:
        rows = [[f"room {n}", json.dumps(found)] for n, found in enumerate(lists)]
        name = _write_csv("rows.csv", ["text", column], rows)
    recipe = _init("--yes", "--data", name)
    assert recipe.task.type == "classification"
    assert recipe.task.multiple
    assert recipe.data.fields == ({} if column == "label" else {"label": "labels"})


def test_questions_and_answers_become_a_chat_recipe_with_mapped_columns() -> None:
    rows = [{"id": number, "question": f"{number} + 1?", "answer": f"It is {number + 1}."} for number in range(20)]
    recipe = _init("--yes", "--data", _write_jsonl("qa.jsonl", rows))
    assert recipe.task.type == "chat"
    assert recipe.data.format == "prompt"
    assert recipe.data.fields == {"prompt": "question", "completion": "answer"}


def test_a_plain_text_file_becomes_a_text_recipe() -> None:
    Path("notes.txt").write_text("One paragraph.\n\nAnother.\n", encoding="utf-8")
    assert _init("--yes", "--data", "notes.txt").task.type == "text"


def test_the_mapping_that_init_writes_is_one_the_data_check_accepts() -> None:
    from luthier.tasks.shapes import Shaper

    rows = [{"question": f"{number}?", "answer": "yes, it is so"} for number in range(9)]
    recipe = _init("--yes", "--data", _write_jsonl("qa.jsonl", rows))
    shaper = Shaper(recipe.task.type, recipe.data.format, recipe.data.fields, recipe.data.template)
    assert shaper.shape(rows[0])["messages"] == [
        {"role": "user", "content": "0?"},
        {"role": "assistant", "content": "yes, it is so"},
    ]


def test_answers_choose_task_base_effort_and_folder() -> None:
    rows = [{"prompt": f"{number} ->", "completion": f" {number}{number}"} for number in range(6)]
    _write_jsonl("train.jsonl", rows)
    recipe = _init(answers="train.jsonl\ncompletion\nmy/base\nbest\nruns/mine\n")
    assert recipe.task.type == "completion"
    assert recipe.base == "my/base"
    assert recipe.output == "runs/mine"
    assert recipe.train.early_stopping is not None


def test_unknown_columns_are_asked_for_and_a_wrong_answer_is_asked_again() -> None:
    _write_csv("rows.csv", ["a", "b", "c"], [["1", "2", "3"], ["4", "5", "6"]])
    recipe = _init(answers="rows.csv\nsongs\nchat\nb\nz\nc\n\n\n\n")
    assert recipe.data.fields == {"prompt": "b", "completion": "c"}
    assert recipe.data.format == "prompt"


def test_unknown_columns_without_questions_are_an_error_that_names_them() -> None:
    _write_csv("rows.csv", ["a", "b"], [["1.5", "2.5"], ["4.5", "5.5"]])
    with pytest.raises(RecipeError, match="a, b"):
        _init("--yes", "--data", "rows.csv")
    assert not Path("recipe.yaml").exists()


def test_an_existing_recipe_is_left_as_it_is() -> None:
    data = _write_jsonl("train.jsonl", CHAT)
    Path("recipe.yaml").write_text("mine: true\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="left as it is"):
        _init("--yes", "--data", data)
    with pytest.raises(RecipeError, match="left as it is"):
        _init("--data", data, answers="n\n")
    assert Path("recipe.yaml").read_text(encoding="utf-8") == "mine: true\n"


def test_an_existing_recipe_is_replaced_when_asked_to() -> None:
    data = _write_jsonl("train.jsonl", CHAT)
    Path("recipe.yaml").write_text("mine: true\n", encoding="utf-8")
    assert _init("--data", data, answers="y\n\n\n\n\n").task.type == "chat"
    Path("recipe.yaml").write_text("mine: true\n", encoding="utf-8")
    assert _init("--yes", "--force", "--data", data).task.type == "chat"
    assert sorted(path.name for path in Path().iterdir()) == ["recipe.yaml", "train.jsonl"]


def test_the_input_may_end_early() -> None:
    with pytest.raises(RecipeError, match="input ended"):
        _init(answers="")


def test_an_unreadable_row_among_others_is_told_and_does_not_stop() -> None:
    _write_jsonl("train.jsonl", CHAT)
    with open("train.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"messages": [\n')
    result = CliRunner().invoke(app, ["init", "--yes", "--data", "train.jsonl"])
    assert result.exit_code == 0
    assert "line 4" in result.stderr


def test_a_file_without_any_readable_row_is_an_error() -> None:
    Path("train.jsonl").write_text('{"messages": [\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1"):
        _init("--yes", "--data", "train.jsonl")


def test_a_held_out_file_beside_is_used() -> None:
    _write_jsonl("data/validation.jsonl", CHAT)
    recipe = _init("--yes", "--data", _write_jsonl("data/train.jsonl", CHAT))
    assert recipe.data.validation == "data/validation.jsonl"


def test_a_recipe_in_another_folder_finds_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _write_jsonl("data/train.jsonl", CHAT)
    _init("--yes", "--data", data, "--output", "recipes/mine.yaml", recipe="recipes/mine.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe("../recipes/mine.yaml")
    assert Path(str(recipe.data.train)).samefile(tmp_path / "data" / "train.jsonl")


def test_a_taken_run_folder_is_not_suggested() -> None:
    Path("runs/train").mkdir(parents=True)
    assert _init("--yes", "--data", _write_jsonl("train.jsonl", CHAT)).output == "runs/train-2"


def test_odd_names_survive_yaml() -> None:
    data = _write_jsonl("it's: a #1 file.jsonl", CHAT)
    assert _init("--yes", "--data", data, "--base", "yes", "--run", "runs/2026").data.train == data
    values = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))
    assert values["base"] == "yes"
