"""The check: what is counted, what is refused by line, what is warned of."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from luthier.data.check import CheckedRow, check_data
from luthier.data.report import DataReport, length_histogram, report_from_json
from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.recipe import DataConfig
from luthier.tasks.chat.schema import ChatConfig
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.completion.schema import CompletionConfig
from luthier.tasks.registry import task_for
from luthier.tasks.text.schema import TextConfig

CONFIGS: dict[str, Any] = {
    "chat": ChatConfig(),
    "completion": CompletionConfig(),
    "classification": ClassificationConfig(),
    "text": TextConfig(),
}


def write_rows(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def check(
    train: str | list[str], renderer: Renderer | None, task: str = "completion", config: Any = None, **options: Any
) -> DataReport:
    fields = {name: options.pop(name) for name in ("validation", "format", "fields", "template") if name in options}
    data = DataConfig(train=train, **{"validation": None, **fields})
    return check_data(data, task_for(config or CONFIGS[task]), renderer, **{"max_length": 256, **options})


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Question {number}?", "completion": f" Answer {number}"}


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"turn {index}"} for index, role in enumerate(roles)]}


def test_counts_of_a_small_dataset(tmp_path: Path, chatml: Renderer) -> None:
    report = check(write_rows(tmp_path / "train.jsonl", [pair(number) for number in range(10)]), chatml)
    assert (report.format, report.errors, report.warnings) == ("prompt", [], [])
    part = report.train
    assert (part.num_rows, part.num_examples, report.validation) == (10, 10, None)
    prompt, reply = len(chatml.encode("Question 1?")), len(chatml.encode(" Answer 1"))
    assert part.num_tokens == 10 * (prompt + reply + 1)
    assert part.num_supervised_tokens == 10 * (reply + 1)
    assert part.length_at(0.5) == max(part.lengths) == prompt + reply + 1
    assert part.longest[0].place == "train.jsonl, line 1"


def test_every_bad_row_is_named_by_line_and_field(tmp_path: Path, chatml: Renderer) -> None:
    good = chat("user", "assistant")
    rows = [good] * 6 + [
        '{"messages": [',
        {"mesages": []},
        chat("user"),
        chat("system", "assistant", "user"),
        chat("user", "user", "assistant"),
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "asistant", "content": "y"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
    ]
    report = check(write_rows(tmp_path / "train.jsonl", rows), chatml, "chat")
    assert report.num_problems == 8
    assert [problem.line for problem in report.problems] == list(range(7, 15))
    assert all(problem.found and problem.expected for problem in report.problems)
    fields = [problem.field for problem in report.problems]
    assert fields[0] == ""
    assert fields[1:6] == ["", "messages", "messages[1].role", "messages[1].role", "messages[1].content"]
    assert "mesages" in report.problems[1].found
    assert report.train.num_rows == 6
    with pytest.raises(DataError) as caught:
        report.raise_for_errors()
    assert "8 rows cannot be trained on" in caught.value.message
    assert f"{tmp_path / 'train.jsonl'}, line 7" in caught.value.message
    assert "and 3 more" in caught.value.message


def test_a_bad_file_among_several_is_named(tmp_path: Path, chatml: Renderer) -> None:
    first = write_rows(tmp_path / "first.jsonl", [pair(1), pair(2)])
    second = write_rows(tmp_path / "second.jsonl", [pair(3), {"prompt": "x"}])
    (problem,) = check([first, second], chatml).problems
    assert (problem.file, problem.line, problem.field) == (second, 2, "completion")
    assert "is missing" in problem.found


def test_all_problems_are_counted_and_the_first_kept(tmp_path: Path) -> None:
    rows = [pair(0), *['{"prompt"'] * 150, *[{"prompt": "x"}] * 50]
    report = check(write_rows(tmp_path / "train.jsonl", rows), None)
    assert report.problem_counts == {"broken_json": 150, "schema": 50}
    assert len(report.problems) == 100


@pytest.mark.parametrize("content", ["\n\n  \n", "prompt,completion\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("train.csv" if "," in content else "train.jsonl")
    path.write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        check(str(path), None)


def long_pair(num_words: int) -> dict[str, str]:
    return {"prompt": "a question", "completion": " word" * num_words}


def test_rows_that_are_cut_are_warned_of(tmp_path: Path, chatml: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [pair(1), long_pair(300), pair(2)])
    report = check(path, chatml, max_length=64)
    assert (report.num_problems, report.train.num_cut, report.train.num_examples) == (0, 1, 3)
    longest = report.train.longest[0]
    assert longest.place == "train.jsonl, line 2"
    assert longest.num_tokens == len(chatml.encode("a question" + " word" * 300)) + 1
    assert "1 of 3 training rows will be cut" in report.warnings[0]
    assert max(report.train.lengths) == 64


def test_a_row_of_just_the_longest_length_is_not_cut(tmp_path: Path, chatml: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [pair(1)])
    num_tokens = check(path, chatml).train.num_tokens
    assert check(path, chatml, max_length=num_tokens).train.num_cut == 0
    assert check(path, chatml, max_length=num_tokens - 1).train.num_cut == 1


def test_a_row_that_cutting_would_strip_of_all_labels_is_an_error(tmp_path: Path, chatml: Renderer) -> None:
    stripped = {"prompt": "word " * 300, "completion": "answer"}
    path = write_rows(tmp_path / "train.jsonl", [pair(1), stripped])
    (problem,) = check(path, chatml, max_length=64).problems
    assert (problem.line, problem.kind) == (2, "truncated")
    assert check(path, chatml, max_length=64, truncation="start").num_problems == 0
    dropped = check(path, chatml, max_length=64, truncation="drop")
    assert (dropped.num_problems, dropped.train.num_dropped, dropped.train.num_examples) == (0, 1, 1)
    assert "left out" in dropped.warnings[0]


def test_a_long_row_is_an_error_where_the_recipe_says_so(tmp_path: Path, chatml: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [pair(1), long_pair(300)])
    (problem,) = check(path, chatml, max_length=64, truncation="error").problems
    assert (problem.line, problem.kind) == (2, "truncated")


def test_dropping_every_row_is_refused(tmp_path: Path, chatml: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [long_pair(300)])
    with pytest.raises(DataError, match="every training row is longer"):
        check(path, chatml, max_length=64, truncation="drop")


def test_duplicates_name_both_places(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", [pair(0), pair(1), pair(0)])
    second = write_rows(tmp_path / "second.jsonl", [pair(2), pair(1), pair(0)])
    report = check([first, second], None)
    assert report.num_duplicates == 3
    assert [(repeat.place, repeat.first_place) for repeat in report.duplicates] == [
        ("first.jsonl, line 3", "first.jsonl, line 1"),
        ("second.jsonl, line 2", "first.jsonl, line 2"),
        ("second.jsonl, line 3", "first.jsonl, line 1"),
    ]
    assert "3 training rows repeat" in report.warnings[0]


def test_equal_records_of_different_shapes_are_duplicates(tmp_path: Path) -> None:
    rows = [chat("user", "assistant"), {"prompt": "turn 0", "completion": "turn 1"}]
    assert check(write_rows(tmp_path / "train.jsonl", rows), None, "chat").num_duplicates == 1


def test_overlap_of_train_and_validation_names_both_places(tmp_path: Path, chatml: Renderer) -> None:
    train = write_rows(tmp_path / "train.jsonl", [pair(number) for number in range(10)])
    held_out = write_rows(tmp_path / "held_out.jsonl", [pair(100), pair(7), pair(101)])
    report = check(train, chatml, validation=held_out)
    assert (report.num_overlapping, report.num_duplicates) == (1, 0)
    assert report.validation is not None
    assert (report.train.num_rows, report.validation.num_rows) == (10, 3)
    (repeat,) = report.overlapping
    assert (repeat.place, repeat.first_place) == ("held_out.jsonl, line 2", "train.jsonl, line 8")
    assert any("1 of 3 held-out rows" in warning for warning in report.warnings)


def test_a_share_is_held_out_and_never_overlaps(tmp_path: Path, chatml: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [pair(number // 2) for number in range(100)])
    seen: dict[str, set[str]] = {"train": set(), "validation": set()}

    def sink(row: CheckedRow) -> None:
        seen[row.part].add(row.record.prompt)
        assert len(row.examples) == 1
        assert row.examples[0].row == row.index

    report = check(path, chatml, validation=0.2, sink=sink)
    assert report.validation is not None
    assert (report.train.num_rows, report.validation.num_rows) == (80, 20)
    assert not seen["train"] & seen["validation"]
    assert len(seen["train"] | seen["validation"]) == 50


def test_too_few_rows_to_hold_out_is_said(tmp_path: Path) -> None:
    report = check(write_rows(tmp_path / "train.jsonl", [pair(1)]), None, validation=0.1)
    assert report.validation is None
    assert "nothing is held out" in report.warnings[0]


def labelled(label: str | int, number: int) -> dict[str, Any]:
    return {"text": f"text {number}", "label": label}


def test_classes_are_those_of_the_training_rows(tmp_path: Path, chatml: Renderer) -> None:
    rows = [labelled(label, number) for number, label in enumerate(["b", "a", "c", "a"])]
    report = check(write_rows(tmp_path / "train.jsonl", rows), chatml, "classification")
    assert report.labels == ["a", "b", "c"]
    assert report.train.classes == {"a": 2, "b": 1, "c": 1}
    assert report.train.num_supervised_tokens == 0


def test_a_held_out_class_that_training_lacks_is_an_error_by_line(tmp_path: Path, chatml: Renderer) -> None:
    train = write_rows(tmp_path / "train.jsonl", [labelled("a", 1), labelled("b", 2)])
    held_out = write_rows(tmp_path / "held_out.jsonl", [labelled("a", 3), labelled("z", 4)])
    (problem,) = check(train, chatml, "classification", validation=held_out).problems
    assert (problem.file, problem.line, problem.field, problem.kind) == (held_out, 2, "label", "label")


def test_labels_of_the_recipe_hold(tmp_path: Path, chatml: Renderer) -> None:
    train = write_rows(tmp_path / "train.jsonl", [labelled("b", 1), labelled("q", 2), labelled("b", 3)])
    report = check(train, chatml, config=ClassificationConfig(labels=["b", "a"]))
    assert [problem.line for problem in report.problems] == [2]
    assert report.labels == ["b", "a"]
    assert any("no training row: 'a'" in warning for warning in report.warnings)


def test_one_class_is_nothing_to_learn(tmp_path: Path, chatml: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [labelled("a", 1), labelled("a", 2)])
    with pytest.raises(DataError, match="the label 'a'"):
        check(path, chatml, "classification")
    broken = write_rows(tmp_path / "broken.jsonl", [labelled("a", 1), "{"])
    assert [problem.line for problem in check(broken, chatml, "classification").problems] == [2]


def test_columns_are_mapped_and_composed(tmp_path: Path, chatml: Renderer) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"q": "Why?", "topic": "life", "a": "So."}])
    records = []
    report = check(
        path,
        chatml,
        fields={"completion": "a"},
        template={"prompt": "{{ topic }}: {{ q }}"},
        sink=lambda row: records.append(row.record),
    )
    assert report.errors == []
    assert report.format == "prompt"
    assert (records[0].prompt, records[0].completion) == ("life: Why?", "So.")


def test_a_book_becomes_windows(tmp_path: Path, chatml: Renderer) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Chapter {number}. " + "word " * 500 for number in range(30)))
    report = check(str(path), chatml, "text", max_length=128, validation=0.2)
    assert report.errors == []
    assert report.train.num_cut == 0
    assert report.train.num_examples > 100
    assert report.validation is not None
    assert max(report.train.lengths) == 128


def test_the_report_comes_back_from_json(tmp_path: Path, chatml: Renderer) -> None:
    rows = [pair(number) for number in (*range(20), 3)]
    report = check(write_rows(tmp_path / "train.jsonl", [*rows, "{"]), chatml, validation=0.2)
    values = json.loads(json.dumps(report.to_json()))
    assert report_from_json(values).to_json() == values
    assert values["trainable"] is False
    assert values["train"]["lengths"]["max"] == max(report.train.lengths)


def test_a_histogram_counts_every_length_in_round_bins() -> None:
    lengths = {3: 1, 9: 2, 10: 4, 119: 8}
    bins = length_histogram(lengths, max_bins=12)
    assert [(bin.low, bin.high, bin.count) for bin in bins if bin.count] == [(0, 9, 3), (10, 19, 4), (110, 119, 8)]
    assert len(bins) == 12
    assert length_histogram({}) == []
    assert [(bin.low, bin.high, bin.count) for bin in length_histogram({5: 3})] == [(5, 5, 3)]


def test_memory_stays_flat_on_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with open(path, "w") as stream:
        for number in range(4_000):
            stream.write(json.dumps({"prompt": f"{number} " + "word " * 1000, "completion": "more " * 600}) + "\n")
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    report = check(str(path), None, validation=0.1)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.train.num_rows == 3_600
    assert peak_bytes < 3e6


def test_the_check_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, luthier.data.check, luthier.data.prepare, luthier.cli.check; "
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
