"""`luthier check`: what it prints, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click.testing import Result
from typer.testing import CliRunner

from luthier.cli.check import check_command, supervised_segments
from luthier.data.template import Renderer
from luthier.errors import DataError, RecipeError
from luthier.recipe import DataConfig
from luthier.tasks.chat.render import ChatTask

CHAT = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning, Zoë"}]}


def run(*args: object) -> Result:
    app = typer.Typer()
    app.command()(check_command)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_data_file_is_recognized_and_described(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [CHAT] * 3)
    result = run(path, "--base", tiny_llama)
    assert result.exit_code == 0, result.output
    assert "chat (recognized from the columns)" in result.output
    assert "3 rows, 3 examples" in result.output
    assert "lengths in tokens" in result.output
    assert "█" in result.output
    assert "train.jsonl, line 2 repeats: train.jsonl, line 1" in result.output


def test_shown_rows_mark_supervised_tokens_and_special_ones(tmp_path: Path, tiny_llama: Path) -> None:
    result = run(write_rows(tmp_path / "train.jsonl", [CHAT, CHAT]), "--base", tiny_llama, "--show", 1)
    assert result.output.count("«") == 1
    assert "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n«Good morning, Zoë<|im_end|>»" in result.output


def test_several_labels_a_text_are_told_shown_and_never_guessed(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [
        {"text": "wet 💧", "label": ["plumbing", "noise"]},
        {"text": "dark", "label": []},
        {"text": "x", "label": "noise"},
    ]
    path = write_rows(tmp_path / "train.jsonl", rows)
    result = run(path, "--base", tiny_llama)
    assert result.exit_code == 2
    assert "multiple: true" in result.output
    several = "task={type: classification, multiple: true}"
    whole = ("--set", "data.validation=null")
    result = run(path, "--base", tiny_llama, "--set", several, *whole, "--show", 3)
    assert result.exit_code == 0, result.output
    assert "any number of labels, none included (task.multiple)" in result.output
    assert "-> noise, plumbing" in result.output
    values = json.loads(run(path, "--base", tiny_llama, "--set", several, "--show", 3, *whole, "--json").output)
    assert [sample["label"] for sample in values["samples"]] == [["noise", "plumbing"], [], ["noise"]]
    assert values["train"]["classes"] == {"noise": 2, "plumbing": 1}


def test_both_sides_of_a_pair_are_shown_and_measured_by_themselves(tmp_path: Path, tiny_llama: Path) -> None:
    row = {"prompt": "Hello", "chosen": "Good morning", "rejected": "What?"}
    path = write_rows(tmp_path / "train.jsonl", [row, {**row, "rejected": "Go away"}])
    result = run(path, "--base", tiny_llama, "--show", 1)
    assert result.exit_code == 0, result.output
    assert "preference (recognized from the columns)" in result.output
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert f"{prompt}«Good morning<|im_end|>»\n\n<|im_start|>" in result.output
    assert f"{prompt}«What?<|im_end|>»" in result.output
    report = json.loads(run(path, "--base", tiny_llama, "--json").stdout)
    longest, total = report["train"]["lengths"]["max"], report["train"]["num_tokens"]
    assert longest < total / 3  # of four sides


def test_segments_put_together_are_the_whole_text(tiny_llama_bos: Path) -> None:
    renderer = Renderer.load(tiny_llama_bos)
    task = ChatTask()
    (example,) = task.examples(task.parse(CHAT), renderer, 256)
    segments = supervised_segments(example, renderer)
    assert "".join(text for text, _ in segments) == renderer.decode(example.tokens, skip_special=False)
    assert [text for text, supervised in segments if supervised] == ["Good morning, Zoë<|im_end|>"]


def test_problems_are_printed_by_line_with_exit_code_2(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [CHAT] * 6 + ['{"messages": [', {"messages": CHAT["messages"][:1]}])
    result = run(path, "--no-base")
    assert result.exit_code == 2
    assert "2 rows cannot be trained on" in result.output
    assert "train.jsonl, line 7: broken JSON" in result.output
    assert "train.jsonl, line 8 (messages): " in result.output
    assert "to fix:" in result.output


def test_json_is_one_document(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [CHAT, "{"])
    result = run(path, "--base", tiny_llama, "--json", "--show", 1)
    assert result.exit_code == 2
    values = json.loads(result.stdout)
    assert values["trainable"] is False
    assert [problem["line"] for problem in values["problems"]] == [2]
    supervised = [part["text"] for part in values["samples"][0]["segments"] if part["supervised"]]
    assert supervised == ["Good morning, Zoë<|im_end|>"]


def test_a_recipe_is_checked_with_its_overrides(tmp_path: Path, tiny_llama: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"q": f"Why oh why is it number {n}?", "a": "So."} for n in range(20)])
    recipe = {
        "base": str(tiny_llama),
        "task": "completion",
        "data": {"train": "rows.jsonl", "fields": {"prompt": "q", "completion": "a"}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run(path, "--set", "data.validation=0.25")
    assert result.exit_code == 0, result.output
    assert "15 rows" in result.output
    assert "5 rows" in result.output
    # Cut to 8 tokens, no prompt leaves room for its completion.
    assert run(path, "--set", "train.max_length=8").exit_code == 2


def test_classes_are_counted(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"some text {n},{'ab'[n % 3 == 0]}\n" for n in range(30)))
    result = run(path, "--base", tiny_llama, "--show", 1)
    assert result.exit_code == 0, result.output
    assert "classification (recognized from the columns)" in result.output
    assert "classes: 2" in result.output
    assert "-> b" in result.output


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", "{\n{\n", "line 1: broken JSON"),
        ("odd.jsonl", '{"question": "x"}\n', "the columns are question"),
    ],
)
def test_a_file_that_tells_no_task_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    result = run(path, "--no-base")
    assert isinstance(result.exception, DataError)
    assert words in result.exception.message


def test_columns_are_mapped_on_the_command_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "odd.jsonl", [{"question": "x", "answer": "y"}])
    mapping = ("--set", "data.fields.prompt=question", "--set", "data.fields.completion=answer")
    assert run(path, "--no-base", "--task", "completion", *mapping).exit_code == 0


def test_missing_data_is_told_before_a_base_is_fetched(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "no/such-base", "data": DataConfig(train="gone.jsonl").model_dump()}))
    result = run(path)
    assert isinstance(result.exception, DataError)
    assert "there is no data file" in result.exception.message


@pytest.mark.parametrize(
    ("method", "task", "says"),
    [
        ({"type": "lora", "rank": 33}, "completion", "method.rank is 33"),
        ({"type": "dora", "targets": ["q_prj"]}, "completion", "(did you mean 'q_proj'?)"),
        ("bias", "completion", "has none"),
        ({"type": "last_layers", "layers": 3}, "completion", "has 2 blocks"),
        ({"type": "boft", "block_size": 5}, "completion", "block_size"),
        ("prompt", "classification", "a classifier reads none"),
        ({"type": "peft", "name": "booft"}, "completion", "did you mean 'boft'"),
    ],
)
def test_a_method_that_the_base_cannot_take_is_told_as_a_training_tells_it(
    method: Any, task: str, says: str, tmp_path: Path, tiny_llama: Path
) -> None:
    rows: list[Any] = [{"prompt": "a", "completion": "b"}] * 2
    if task == "classification":
        rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    data = write_rows(tmp_path / "train.jsonl", rows)
    recipe = {"base": str(tiny_llama), "task": task, "method": method, "data": {"train": str(data), "validation": None}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run(tmp_path / "recipe.yaml")
    assert isinstance(result.exception, RecipeError)
    assert says in str(result.exception)
    assert run(tmp_path / "recipe.yaml", "--no-base").exit_code == 0  # the data hold, and the base is not asked


def test_a_method_that_fits_is_passed(tmp_path: Path, tiny_llama: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    for method in ("full", "adalora", "ia3"):
        recipe = {"base": str(tiny_llama), "task": "completion", "method": method}
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(recipe | {"data": {"train": str(data), "validation": None}})
        )
        assert run(tmp_path / "recipe.yaml").exit_code == 0
