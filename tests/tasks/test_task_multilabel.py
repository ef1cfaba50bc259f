"""task: {type: classification, multiple: true}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.evaluate.metrics import RowScore, summarize
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.registry import head_of, task_for
from luthier.tasks.task import Task

CONFIG = ClassificationConfig(multiple=True)
TASK = task_for(CONFIG)
LABELS = ["cold", "warm 🔥", "湿"]
SETTLED = TASK.with_labels(LABELS)


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (["warm 🔥", "cold"], ("cold", "warm 🔥")),
        (["cold", " cold "], ("cold",)),
        ("湿", ("湿",)),
        ([], ()),
        ("[]", ()),
        ('["cold", "湿"]', ("cold", "湿")),
        ([3, 1.0], ("1", "3")),
        (7, ("7",)),
        ("[not a list", ("[not a list",)),
    ],
)
def test_a_label_is_a_list_or_stands_for_itself(label: object, names: tuple[str, ...]) -> None:
    record = TASK.parse({"text": "x", "label": label})
    assert record.labels == TASK.labels_of(record) == names
    assert TASK.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("label", "field"), [(None, "label"), ("", "label"), ([""], "label[0]"), (["a", None], "label[1]"), ({}, "label")]
)
def test_what_is_no_label_is_refused_where_it_stands(label: object, field: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse({"text": "x", "label": label})
    assert caught.value.field == field


def test_lists_under_one_class_a_text_name_the_field_to_set() -> None:
    single = task_for(ClassificationConfig())
    for label in (["low"], [], '["low", "high"]'):
        with pytest.raises(RowError, match="multiple: true"):
            single.parse({"text": "x", "label": label})
    assert single.parse({"text": "x", "label": "[1]"}).label == "[1]"


def test_an_example_has_a_flag_for_each_label(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    record = TASK.parse({"text": "two plus two", "label": ["湿", "cold"]})
    (example,) = SETTLED.examples(record, renderer, 64, row=3)
    single = task_for(ClassificationConfig(labels=LABELS))
    (plain,) = single.examples(single.parse({"text": "two plus two", "label": "cold"}), renderer, 64)
    assert example.tokens.tolist() == plain.tokens.tolist()
    assert example.class_flags is not None
    assert example.class_flags.tolist() == [1, 0, 1]
    assert (example.class_index, example.row) == (-1, 3)
    (query,) = SETTLED.queries(record, renderer, 64)
    assert query.class_flags is not None
    assert not query.class_flags.any()
    with pytest.raises(RowError, match="does not occur in the training rows"):
        SETTLED.examples(TASK.parse({"text": "x", "label": ["dry"]}), renderer, 64)
    with pytest.raises(RowError, match="not one of the 3 labels"):
        SETTLED.parse({"text": "x", "label": ["colt"]})


def test_options_hold_together() -> None:
    assert head_of(TASK) == "multilabel"
    assert (TASK.threshold, task_for(ClassificationConfig()).threshold) == (0.5, None)
    assert task_for(ClassificationConfig(multiple=True, labels=["toxic"])).labels == ("toxic",)
    for values in ({"labels": []}, {"labels": ["a", "a"]}, {"threshold": 0.0}, {"threshold": 1.0}):
        with pytest.raises(ValidationError):
            ClassificationConfig.model_validate({"multiple": True, **values})
    with pytest.raises(ValidationError, match="multiple: true"):
        ClassificationConfig(threshold=0.3)
    with pytest.raises(DataError, match="one label or more"):
        TASK.with_labels([])


def read(task: Task, probabilities: list[float]) -> Any:
    return task.read(None, None, 64, [np.asarray([probabilities], dtype=np.float32)])  # type: ignore[arg-type]


def test_labels_are_given_from_the_threshold_on() -> None:
    record = TASK.parse({"text": "x", "label": ["湿"]})
    prediction = read(SETTLED, [0.2, 0.5, 0.7])
    assert list(prediction) == ["湿", "warm 🔥", "cold"]
    shown = SETTLED.present(record, prediction)
    assert shown["labels"] == ["湿", "warm 🔥"]
    assert shown["probabilities"] == pytest.approx({"湿": 0.7, "warm 🔥": 0.5, "cold": 0.2})
    strict = task_for(ClassificationConfig(multiple=True, threshold=0.75, labels=LABELS))
    assert strict.present(record, prediction)["labels"] == []
    assert strict.mark(record, prediction).reply == "(none)"
    assert "0.75 or more" in strict.signatures([])["labels given"]


def test_scores_by_hand() -> None:
    """Given against true: {a,b}/{a}, {}/{}, {b}/{c}, {}/{a,c}. F1 of a: 2/3, b: 0, c: 0; d never occurs."""
    task = TASK.with_labels(["a", "b", "c", "d"])
    cases = [("ab", "a"), ("", ""), ("b", "c"), ("", "ac")]
    scores = []
    for row, (given, true) in enumerate(cases):
        record = TASK.parse({"text": "x", "label": list(true)})
        marks = task.mark(record, read(task, [0.9 if name in given else 0.1 for name in "abcd"]))
        assert marks.is_right == (given == true)
        scores.append(RowScore(row, ratios=marks.ratios, statistics=marks.statistics, parts=marks.parts))
    summary = summarize(scores)
    assert summary["macro_f1"]["value"] == pytest.approx((2 / 3) / 3)
    assert summary["micro_f1"]["value"] == pytest.approx(2 * 1 / (3 + 4))
    assert summary["subset_accuracy"]["value"] == pytest.approx(1 / 4)
    for score in summary.values():
        assert score["rows"] == 4
        assert score["low"] <= score["value"] <= score["high"]
    assert scores[0].parts["b"]["precision"] == (0.0, 1.0)
    nothing = [
        RowScore(0, ratios=m.ratios, statistics=m.statistics)
        for m in [task.mark(TASK.parse({"text": "x", "label": []}), read(task, [0.1] * 4))]
    ]
    assert summarize(nothing).keys() == {"subset_accuracy"}


def test_scores_equal_scikit_learns() -> None:
    from sklearn.metrics import f1_score

    random = np.random.default_rng(0)
    true, probabilities = random.integers(2, size=(40, 4)), random.random((40, 4))
    task = TASK.with_labels(["a", "b", "c", "d"])
    scores = []
    for row in range(40):
        record = TASK.parse(
            {"text": "x", "label": [name for name, flag in zip("abcd", true[row], strict=True) if flag]}
        )
        marks = task.mark(record, read(task, probabilities[row].tolist()))
        scores.append(RowScore(row, ratios=marks.ratios, statistics=marks.statistics))
    summary = summarize(scores)
    for average in ("macro", "micro"):
        wanted = f1_score(true, probabilities >= 0.5, average=average)
        assert summary[f"{average}_f1"]["value"] == pytest.approx(wanted)
