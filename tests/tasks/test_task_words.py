"""task: {type: classification, head: words}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from task_checks import check_exchange
from tiny_templates import FAMILIES, write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.classification.words import WordsTask
from luthier.tasks.registry import head_of, task_for

LABELS = ["card", "card lost", "送金 💸"]


def words_task(**options: Any) -> WordsTask:
    task = task_for(ClassificationConfig(head="words", labels=options.pop("labels", LABELS), **options))
    assert isinstance(task, WordsTask)
    return task


@pytest.mark.parametrize("family", FAMILIES)
def test_the_label_is_the_answer_of_an_exchange(family: str, tmp_path: Path) -> None:
    task = words_task(words={"card": "a question on cards"})
    row = {"text": "Where is my card?", "label": "card"}
    prompt = check_exchange(task, row, "a question on cards", family, tmp_path)
    _, answers = task.answers(task.parse(row), Renderer.load(tmp_path))
    assert len(answers) == len(set(answers)) == 3
    assert prompt.reference == "a question on cards"
    assert (head_of(task), task.chooses, task.generates, task.outputs) == (None, True, False, ())


@pytest.mark.parametrize("with_shots", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "no template"])
def test_what_is_scored_is_what_was_learnt(family: str, with_shots: bool, tmp_path: Path) -> None:
    """Prompt, words and end of each label are the tokens that carried loss, whatever the template puts around them."""
    folder = write_family(tmp_path, "llama3" if family == "no template" else family)
    if family == "no template":
        (folder / "chat_template.jinja").unlink()
    renderer, task = Renderer.load(folder), words_task()
    shots = [task.parse({"text": "Lost!", "label": "card lost"})] if with_shots else []
    for k, label in enumerate(LABELS):
        record = task.parse({"text": "two plus two", "label": label})
        (example,) = task.examples(record, renderer, 2048)
        tokens, answers = task.answers(record, renderer, shots)
        supervised = example.tokens[example.weights > 0].tolist()
        assert list(answers[k]) == supervised
        if not shots:
            start = int((example.weights > 0).argmax())
            assert tokens.tolist() == example.tokens[:start].tolist()
        else:
            assert "Lost!" in renderer.decode(tokens)
            assert "card lost" in renderer.decode(tokens)


def test_the_instruction_may_list_the_labels_or_be_empty(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    record = words_task().parse({"text": "Hello", "label": "card"})
    (listed,) = words_task(instruction="One of {labels}:").prompts(record, renderer)
    assert "One of card, card lost, 送金 💸:\n\nHello" in listed.text
    (bare,) = words_task(instruction="").prompts(record, renderer)
    assert "fits" not in bare.text
    (shown,) = words_task().prompts(record, renderer, [words_task().parse({"text": "Lost!", "label": "card lost"})])
    assert "Lost!" in shown.text
    assert "card lost" in shown.text


def test_a_long_text_is_cut_and_never_its_label(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    task = words_task(instruction="")
    record = task.parse({"text": "a" + "b" * 300 + "c", "label": "card lost"})
    whole = task.examples(record, renderer, 4096)[0].num_tokens
    most = whole - 100
    for truncation, kept in (("end", "a"), ("start", "c")):
        (example,) = task.examples(record, renderer, most, truncation)  # type: ignore[arg-type]
        assert most - 8 < example.num_tokens <= most
        user = renderer.decode(example.tokens).split("user\n")[1].split("\nassistant")[0].rstrip()
        assert set(user) == {"b", kept}
        assert renderer.decode(example.tokens[example.weights > 0]).strip() == "card lost"
    assert task.examples(record, renderer, most, "drop") == []
    for truncation in ("error", "end"):
        with pytest.raises(RowError) as caught:
            task.examples(record, renderer, 12, truncation)  # type: ignore[arg-type]
        assert caught.value.kind == "truncated"


def test_a_prediction_is_marked_as_the_linear_heads_is() -> None:
    task = words_task()
    record = task.parse({"text": "x", "label": "card lost"})
    prediction = task.read(record, None, 64, [np.asarray([[0.3, 0.6, 0.1]], dtype=np.float32)])  # type: ignore[arg-type]
    marks = task.mark(record, prediction)
    assert (marks.reply, marks.is_right, marks.class_index, marks.predicted_class) == ("card lost", True, 1, 1)
    assert task.present(record, prediction)["label"] == "card lost"
    assert "N/A" in words_task(calibration="prior").signatures([])["label chosen"]
    assert "N/A" not in task.signatures([])["label chosen"]


def test_options_hold_together() -> None:
    for values, complaint in (
        ({"head": "words", "multiple": True}, "one label of a text"),
        ({"instruction": "x"}, "instruction goes with head: words"),
        ({"words": {"a": "b"}}, "words goes with head: words"),
        ({"calibration": "prior"}, "calibration goes with head: words"),
    ):
        with pytest.raises(ValidationError, match=complaint):
            ClassificationConfig.model_validate(values)
    with pytest.raises(DataError, match="none of the 3 labels"):
        words_task(words={"cart": "x"})
    for words in ({"card": " "}, {"card": "card lost"}):
        with pytest.raises(DataError, match="no words, or two labels the same"):
            words_task(words=words)
    with pytest.raises(DataError, match="two or more"):
        task_for(ClassificationConfig(head="words")).with_labels(["a"])
