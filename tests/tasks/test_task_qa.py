"""task: qa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from task_checks import check_exchange
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.qa.metrics import exact_match, f1, normalize
from luthier.tasks.qa.schema import QaConfig
from luthier.tasks.registry import task_for
from luthier.types import NO_CLASS

TASK = task_for(QaConfig())
ROW = {"context": "The capital of France is Paris.", "question": "What is the capital?", "answers": ["Paris"]}


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_the_question_is_the_prompt_and_the_answer_carries_loss(family: str, tmp_path: Path) -> None:
    prompt = check_exchange(TASK, ROW, "Paris", family, tmp_path)
    assert prompt.text.index(ROW["context"]) < prompt.text.index(ROW["question"])
    assert prompt.reference == "Paris"


def test_a_base_without_a_template_reads_plain_text(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama3")
    for name in ("chat_template.jinja",):
        (folder / name).unlink(missing_ok=True)
    renderer = Renderer.load(folder)
    assert not renderer.can_chat
    record = TASK.parse(ROW)
    (example,) = TASK.examples(record, renderer, 2048)
    (prompt,) = TASK.prompts(record, renderer)
    assert example.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    assert example.tokens[-1] == renderer.eos_id
    assert example.tokens[0] == renderer.bos_id
    assert prompt.text.endswith("Question: What is the capital?\n\n")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("Paris", ("Paris",)),
        (["Paris", "the city", "Paris"], ("Paris", "the city")),
        ({"text": ["Paris"], "answer_start": [25]}, ("Paris",)),
        ({"text": [], "answer_start": []}, ()),
        ('["Paris"]', ("Paris",)),
        ([], ()),
        ("", ()),
    ],
)
def test_answers_come_in_several_forms(answers: Any, expected: tuple[str, ...]) -> None:
    assert TASK.parse({**ROW, "answers": answers}).answers == expected


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"context": ""}, "context", "empty"),
        ({"question": 5}, "question", "a number"),
        ({"answers": 5}, "answers", "a list of texts"),
        ({"answers": ["a", ""]}, "answers[1]", "empty"),
        ({"answers": [None]}, "answers[0]", "null"),
    ],
)
def test_what_does_not_hold_is_named(change: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse({**ROW, **change})
    assert caught.value.field == field
    assert said in caught.value.message


def test_an_unanswerable_question_is_right_exactly_when_nothing_is_answered(tmp_path: Path) -> None:
    record = TASK.parse({**ROW, "answers": []})
    (prompt,) = TASK.prompts(record, Renderer.load(write_family(tmp_path, "chatml")))
    assert prompt.reference == "unanswerable"
    right, wrong = TASK.mark(record, "Unanswerable."), TASK.mark(record, "Paris")
    assert (right.is_exact, right.ratios["f1"]) == (True, (1.0, 1.0))
    assert (wrong.is_exact, wrong.ratios["f1"]) == (False, (0.0, 1.0))
    silent = TASK.mark(TASK.parse(ROW), "unanswerable")
    assert (silent.is_exact, silent.ratios["f1"]) == (False, (0.0, 1.0))
    assert TASK.present(record, "unanswerable") == {"answer": None}
    assert TASK.present(record, " Paris ") == {"answer": "Paris"}


def test_choices_are_classes() -> None:
    task = task_for(QaConfig(choices=["yes", "no", "maybe"]))
    record = task.parse({**ROW, "answers": "no"})
    marks = task.mark(record, "No.")
    assert (marks.class_index, marks.predicted_class, marks.is_right) == (1, 1, True)
    assert task.mark(record, "perhaps").predicted_class == 3
    assert TASK.mark(TASK.parse(ROW), "Paris").class_index == NO_CLASS
    with pytest.raises(RowError, match="did you mean 'maybe'") as caught:
        task.parse({**ROW, "answers": ["mayby"]})
    assert caught.value.kind == "label"
    with pytest.raises(RowError, match="is empty"):
        task.parse({**ROW, "answers": []})
    for choices in ([], ["yes"], ["yes", "yes"], ["yes", " "]):
        with pytest.raises(ValidationError, match="two or more"):
            QaConfig(choices=choices)


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "qwen3", "channels", "think-prompt", "no-end", None])
def test_choices_are_the_tokens_that_are_trained(family: str | None, tmp_path: Path) -> None:
    """Behind what the template writes before an answer, and with the answer's end."""
    folder = write_family(tmp_path, family or "llama3")
    if family is None:
        (folder / "chat_template.jinja").unlink()
    renderer = Renderer.load(folder)
    task = task_for(QaConfig(choices=["yes", "no", "may be"]))
    for n, answer in enumerate(["yes", "no", "may be"]):
        record = task.parse({**ROW, "answers": answer})
        (prompt,) = task.prompts(record, renderer)
        (example,) = task.examples(record, renderer, 2048)
        assert [*prompt.tokens.tolist(), *prompt.choices[n]] == example.tokens.tolist()


def test_reasoning_in_front_is_no_part_of_an_answer() -> None:
    task = task_for(QaConfig(choices=["yes", "no", "maybe"]))
    record = task.parse({**ROW, "answers": "no"})
    marks = task.mark(record, "<think>\n\n</think>\n\nno")
    assert (marks.is_exact, marks.predicted_class) == (True, 1)
    assert task.present(record, "<think>\nyes?\n</think>\n\nno") == {"answer": "no"}


@pytest.mark.parametrize(("truncation", "answer"), [("end", "alpha"), ("start", "omega")])
def test_a_long_text_is_cut_and_the_answer_stays(truncation: Any, answer: str, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    row = {"context": "alpha " + "word " * 200 + "omega", "question": "Which?", "answers": [answer]}
    record = TASK.parse(row)
    (example,) = TASK.examples(record, renderer, 160, truncation)
    assert 150 < example.num_tokens <= 160
    text = renderer.decode(example.tokens, skip_special=False)
    assert text.count(answer) == 2
    assert "Which?" in text
    lost = "omega" if answer == "alpha" else "alpha"
    with pytest.raises(RowError, match="and the answer with it") as caught:
        TASK.examples(TASK.parse({**row, "answers": [lost]}), renderer, 160, truncation)
    assert caught.value.kind == "truncated"
    assert TASK.examples(record, renderer, 160, "drop") == []
    with pytest.raises(RowError, match="tokens long"):
        TASK.examples(record, renderer, 160, "error")
    with pytest.raises(RowError, match="no room"):
        TASK.examples(record, renderer, 12, truncation)


def test_shots_stand_in_front_answered(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    shot = TASK.parse({**ROW, "question": "Which city?"})
    (prompt,) = TASK.prompts(TASK.parse(ROW), renderer, [shot])
    assert prompt.text.index("Which city?") < prompt.text.index("Paris<|im_end|>") < prompt.text.index("What is the")


# Worked out by hand from the definition in the papers: lower case, no punctuation, no articles, single spaces.
@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("a $5.00 note", "500 note"),
        ("An A-team", "ateam"),
        ("theatre", "theatre"),
        ("„Zürich“", "zürich"),
        ("東京。", "東京"),
        ("😀", "😀"),
        ("...", ""),
    ],
)
def test_normalization(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


def test_exact_match_and_f1() -> None:
    assert exact_match("the Seine.", ["Loire", "Seine"])
    assert not exact_match("Seine river", ["Seine"])
    assert f1("the river Seine", ["Seine"]) == pytest.approx(2 * 1 / (2 + 1))
    assert f1("Seine", ["Loire", "river Seine"]) == pytest.approx(2 / 3)
    assert f1("b b a", ["b a b c"]) == pytest.approx(2 * 2 / (2 + 3))  # "a" is an article
    assert f1("", ["Seine"]) == 0.0
    assert f1("the", ["a"]) == 1.0  # nothing is left of either
    assert f1("東京都", ["東京"]) == pytest.approx(2 * 2 / 5)
