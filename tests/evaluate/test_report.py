from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluate_runs import BEST_STEP, CLASSES, build_classification_run

from luthier.errors import RunError, StorageError
from luthier.evaluate import figures, samples
from luthier.evaluate.record import read_run
from luthier.evaluate.report import write_report
from luthier.evaluate.summary import format_seconds, headline, summary_table, verdict
from luthier.files import write_text

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Balance(HTMLParser):
    """Checks that tags close in order, and keeps the text and the names of tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def page_of(run: Path) -> tuple[str, Balance]:
    html = write_report(run).read_text(encoding="utf-8")
    return html, Balance(html)


def test_the_report_answers_did_it_get_better_and_what_did_it_cost(chat_run: Path) -> None:
    html, page = page_of(chat_run)
    assert "<title>Exact match on 96 held-out rows: 3% → 91% · runs/first</title>" in html
    for expected in (
        "better",
        "base, 3 examples",
        "25.0%",
        f"kept: step {BEST_STEP}",
        "4 min 03 s",
        "412,345",
        "1.3 GiB",
        "3.6% of 134.52 M",
        "2 rows have an empty system turn",
        "4 training rows repeat an earlier row",
        "tokens in a training example",
        "learning_rate: 0.0005",
        "5.23.0",
        "luthier chat runs/first",
        "AutoPeftModelForCausalLM",
        "several steps",
    ):
        assert expected in page.text, expected
    assert "Training stopped" not in page.text


def test_the_page_is_whole_in_itself(chat_run: Path) -> None:
    html, page = page_of(chat_run)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"(https?:)?//\w", html)
    assert not re.search(r"url\((?!#)", html)
    assert page.tags.count("svg") == 4  # loss, learning rate, gradient norm, lengths
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(set(ids)) == len(ids)


def test_failures_are_shown_first(chat_run: Path) -> None:
    _, page = page_of(chat_run)
    titles = ["Right before, wrong now", "Still wrong", "Wrong before, right now", "Right before and now"]
    places = [page.text.index(title) for title in titles]
    assert places == sorted(places)
    assert "6 of 8 rows" in page.text


def test_what_the_data_says_is_never_markup(classification_run: Path) -> None:
    html, page = page_of(classification_run)
    assert "<script" not in html
    assert page.text.count(CLASSES[1]) > 1  # "<script>..." as text
    assert "$ light_on $" in page.text  # not read as mathematics


def test_a_classifier_gets_its_confusion(classification_run: Path) -> None:
    html, page = page_of(classification_run)
    assert "Accuracy on 120 held-out rows" in page.text
    assert "Macro-F1" in page.text
    assert "Confusion matrix" in html
    assert 'subfolder="classifier"' in page.text
    names, matrix_CC = samples.confusion(read_run(classification_run).predictions)
    assert names == sorted(CLASSES)
    assert matrix_CC.sum() == 120
    assert (matrix_CC.sum(axis=1) == 20).all()
    pairs = samples.confused_pairs(names, matrix_CC)
    assert sum(pair[2] for pair in pairs) == matrix_CC.sum() - np.trace(matrix_CC)
    assert pairs[0][2] == max(pair[2] for pair in pairs)


def test_of_many_classes_those_with_the_most_mistakes_are_drawn(tmp_path: Path) -> None:
    names, matrix_CC = ["a", "b", "c", "d"], np.diag([5, 5, 5, 5])
    matrix_CC[1, 3], matrix_CC[2, 3] = 2, 1
    shown, part_CC = samples.most_mistaken(names, matrix_CC, 2)
    assert (shown, part_CC.tolist()) == (["b", "d"], [[5, 2], [0, 5]])
    html, page = page_of(build_classification_run(tmp_path / "many", [f"class {i:02d}" for i in range(40)]))
    assert "Confusion matrix" in html
    assert "The 30 of 40 classes with the most mistakes" in page.text
    assert "of 40 classes" in page.text
    assert page.text.count("of 20") == samples.MAX_CONFUSED_PAIRS


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("eval.json", "Not judged on held-out rows"),
        ("metrics.jsonl", "No training steps were recorded"),
        ("predictions.jsonl", "No replies were generated"),
        ("result.json", "No cost was recorded"),
        ("data.json", "No data report was recorded"),
        ("recipe.yaml", "No recipe was recorded"),
        ("versions.json", "Exact match"),
    ],
)
def test_a_missing_part_is_said_to_be_missing(chat_run: Path, missing: str, said: str) -> None:
    (chat_run / missing).unlink()
    _, page = page_of(chat_run)
    assert said in page.text


def test_an_empty_folder_has_a_report_and_no_folder_has_none(tmp_path: Path) -> None:
    _, page = page_of(tmp_path)
    assert "Not judged" in page.text
    with pytest.raises(RunError, match="no run folder"):
        write_report(tmp_path / "absent")


def test_broken_parts_are_named_and_the_rest_is_shown(chat_run: Path) -> None:
    lines = (chat_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (chat_run / "metrics.jsonl").write_text("\n".join([*lines[:3], '{"kind": "st', *lines[3:]]), encoding="utf-8")
    (chat_run / "data.json").write_text("[1]", encoding="utf-8")
    (chat_run / "result.json").write_text('{"stopped_because": "the loss is not a number", "advice": "lower it"}')
    html, page = page_of(chat_run)
    assert "metrics.jsonl: 1 line(s)" in page.text
    assert "(line 4)" in page.text
    assert "data.json holds a list" in page.text
    assert "Training stopped: the loss is not a number. lower it" in page.text
    assert "Loss over steps" in html


def test_a_step_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": step, "loss": loss} for step, loss in [(1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0)]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert [line["loss"] for line in read_run(tmp_path).steps] == [3.0, 2.0, 1.0]


def test_losses_that_are_no_numbers_do_not_break_the_picture(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": 1, "loss": 2.0}, {"kind": "step", "step": 2, "loss": None}]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "step", "step": 3, "loss": NaN}'
    (tmp_path / "metrics.jsonl").write_text(text)
    html, _ = page_of(tmp_path)
    assert "Loss over steps" in html
    assert figures.loss_curves([{"step": 1, "loss": float("inf")}], []) is None


def test_long_runs_and_long_replies_keep_the_page_small(chat_run: Path) -> None:
    with (chat_run / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({"kind": "step", "step": step, "loss": 1 / step + 0.1 * (step % 7)}) + "\n")
    with (chat_run / "predictions.jsonl").open("w") as file:
        for row in range(400):
            line = {"row": row, "prompt": "x" * 50_000, "reference": "y", "base": "z", "tuned": "y"}
            file.write(json.dumps(line) + "\n")
    html, page = page_of(chat_run)
    assert len(html) < 2_000_000
    assert "more characters)" in page.text
    assert f"The first 200 of {400} rows" in page.text


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert figures.smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    noisy = np.random.default_rng(0).normal(2.0, 1.0, 400)
    smoothed = figures.smooth(noisy)
    assert smoothed[0] == pytest.approx(noisy[0])
    assert smoothed[100:].std() < 0.5 * noisy[100:].std()


def test_the_comparison_is_worked_out_where_eval_json_lacks_it(chat_run: Path) -> None:
    evaluation = json.loads((chat_run / "eval.json").read_text())
    expected = evaluation.pop("comparison")["exact_match"]
    (chat_run / "eval.json").write_text(json.dumps(evaluation))
    assert read_run(chat_run).evaluation["comparison"]["exact_match"] == expected


def test_a_failed_write_leaves_the_old_report(chat_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(chat_run).read_bytes()
    shutil.rmtree(chat_run / "adapter", ignore_errors=True)
    (chat_run / "eval.json").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write_report(chat_run)
    assert (chat_run / "report.html").read_bytes() == before
    assert not list(chat_run.glob(".report*"))


def test_a_text_that_utf8_cannot_hold_is_written_escaped(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.json", json.dumps("a\ud83d", ensure_ascii=False))
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == "a\ud83d"


def test_summary_table_for_the_command_line(chat_run: Path) -> None:
    table = summary_table(read_run(chat_run).evaluation)
    assert table[0] == ["metric", "base", "base, 3 examples", "tuned", "change", "verdict"]
    assert table[1][0] == "Exact match"
    assert table[1][1] == "3.1% (1.1 to 8.8)"
    assert table[1][-1] == "better"
    assert {len(row) for row in table} == {6}
    assert summary_table({"num_rows": 3}) == [["metric"]]
    bare = {"base": {"loss": 2.0, "num_rows": 4}, "tuned": {"loss": 1.0, "exact_match": 0.5}}
    assert summary_table(bare) == [
        ["metric", "base", "tuned"],
        ["Exact match", "-", "50.0%"],
        ["Loss", "2", "1"],
    ]


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        (0.031, 0.906, "3% → 91%"),
        (0.9, 0.997, "90.0% → 99.7%"),
        (0.0, 1.0, "0% → 100%"),
        (0.503, 0.504, "50.3% → 50.4%"),
    ],
)
def test_the_headline_does_not_round_a_difference_away(base: float, tuned: float, said: str) -> None:
    evaluation = {"num_rows": 1200, "base": {"exact_match": base}, "tuned": {"exact_match": tuned}}
    assert headline(evaluation) == f"Exact match on 1,200 held-out rows: {said}"
    assert verdict(evaluation) is None
    assert headline({"base": {"exact_match": base}}) is None


def test_durations_in_words() -> None:
    assert [format_seconds(s) for s in (3.21, 59.6, 252, 7500)] == ["3.2 s", "1 min 00 s", "4 min 12 s", "2 h 05 min"]
