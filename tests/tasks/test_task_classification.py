"""task: classification."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.tasks.classification.metrics import accuracy, macro_f1
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.registry import task_for

TASK = task_for(ClassificationConfig())
SETTLED = TASK.with_labels(["high", "low"])


def test_an_example_has_a_class_and_no_token_loss(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    record = TASK.parse({"text": "two plus two", "label": "low"})
    assert TASK.labels_of(record) == ("low",)
    (example,) = SETTLED.examples(record, renderer, 2048, row=9)
    assert example.tokens.tolist() == [renderer.bos_id, *renderer.encode("two plus two")]
    assert not example.weights.any()
    assert (example.class_index, example.row) == (1, 9)
    assert SETTLED.prompts(record, renderer) == []
    assert TASK.from_json(record.to_json()) == record


def test_a_text_never_ends_in_padding(tmp_path: Path) -> None:
    """transformers pools at the right-most token that is not padding; pad, EOS and end of turn may be one token."""
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    assert renderer.pad_id == renderer.eos_id
    (plain,) = SETTLED.examples(TASK.parse({"text": "two", "label": "low"}), renderer, 64)
    (ended,) = SETTLED.examples(TASK.parse({"text": "two<|im_end|><|im_end|>", "label": "low"}), renderer, 64)
    assert ended.tokens.tolist() == plain.tokens.tolist()
    inside = TASK.parse({"text": "two<|im_end|>four<|im_end|>", "label": "low"})
    (example,) = SETTLED.examples(inside, renderer, 64)
    assert example.tokens.tolist() == renderer.encode("two<|im_end|>four")
    # Cutting may bring a padding token to the end.
    (cut,) = SETTLED.examples(inside, renderer, len(renderer.encode("two<|im_end|>")), "end")
    assert cut.tokens.tolist() == renderer.encode("two")
    with pytest.raises(RowError) as caught:
        SETTLED.examples(TASK.parse({"text": "<|im_end|>", "label": "low"}), renderer, 64)
    assert caught.value.kind == "empty"


def test_truncation(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    record = TASK.parse({"text": "two plus two is four", "label": "high"})
    ids = renderer.encode(record.text)
    assert SETTLED.examples(record, renderer, 4, "end")[0].tokens.tolist() == [renderer.bos_id, *ids[:3]]
    assert SETTLED.examples(record, renderer, 4, "start")[0].tokens.tolist() == [renderer.bos_id, *ids[-3:]]
    assert SETTLED.examples(record, renderer, 4, "drop") == []
    with pytest.raises(RowError) as caught:
        SETTLED.examples(record, renderer, 4, "error")
    assert caught.value.kind == "truncated"


@pytest.mark.parametrize(("label", "name"), [("low", "low"), (" low ", "low"), (3, "3"), (3.0, "3")])
def test_labels_may_be_texts_or_whole_numbers(label: object, name: str) -> None:
    assert TASK.parse({"text": "x", "label": label}).label == name


@pytest.mark.parametrize("label", [None, "", True, 1.5, ["low"]])
def test_other_labels_are_refused(label: object) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse({"text": "x", "label": label})
    assert caught.value.field == "label"


def test_unknown_labels_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="did you mean 'high'") as caught:
        SETTLED.parse({"text": "x", "label": "hihg"})
    assert caught.value.kind == "label"
    named = task_for(ClassificationConfig(labels=["a", "b"]))
    assert named.labels == ("a", "b")
    with pytest.raises(RowError):
        named.parse({"text": "x", "label": "c"})
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    with pytest.raises(RowError, match="does not occur in the training rows"):
        SETTLED.examples(TASK.parse({"text": "x", "label": "middle"}), renderer, 64)


def test_labels_must_be_two_or_more_and_differ() -> None:
    for labels in ([], ["a"], ["a", "a"]):
        with pytest.raises(DataError, match="two or more"):
            TASK.with_labels(labels)
        with pytest.raises(ValidationError, match="two or more"):
            ClassificationConfig(labels=labels)


def test_accuracy_and_macro_f1() -> None:
    true, predicted = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 0, 3]
    assert accuracy(predicted, true) == pytest.approx(4 / 7)
    assert macro_f1(predicted, true) == pytest.approx((2 / 4 + 4 / 5 + 2 / 4 + 0) / 4)
    with pytest.raises(ValueError, match="predictions"):
        accuracy([], [])
