"""task: completion."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.completion.schema import CompletionConfig
from luthier.tasks.registry import task_for

TASK = task_for(CompletionConfig())
ROW = {"prompt": "Query: two plus two?\nIntent:", "completion": " four"}


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_the_prompt_is_the_beginning_and_eos_the_end(name: str, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, name))
    record = TASK.parse(ROW)
    (example,) = TASK.examples(record, renderer, 2048, row=2)
    (prompt,) = TASK.prompts(record, renderer, row=2)
    num_prompt = len(prompt.tokens)
    assert example.tokens[:num_prompt].tolist() == prompt.tokens.tolist()
    assert (example.weights[:num_prompt] == 0).all()
    assert (example.weights[num_prompt:] == 1).all()
    assert example.tokens[-1] == renderer.eos_id
    assert example.tokens.tolist().count(renderer.eos_id) == 1
    if renderer.bos_id is not None:
        assert example.tokens[0] == renderer.bos_id
        assert example.tokens.tolist().count(renderer.bos_id) == 1
    assert renderer.decode(example.tokens[num_prompt:]).strip() == "four"
    assert prompt.reference == " four"
    assert example.row == prompt.row == 2


def test_a_border_inside_a_word_is_kept_as_served(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    record = TASK.parse({"prompt": "Good mor", "completion": "ning"})
    (example,) = TASK.examples(record, renderer, 2048)
    (prompt,) = TASK.prompts(record, renderer)
    assert example.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    assert renderer.decode(example.tokens) == "Good morning"
    assert renderer.encode("Good morning") != example.tokens[:-1].tolist()  # else this shows nothing


def test_a_completion_that_brings_eos_or_bos_has_it_once(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    record = TASK.parse({"prompt": "<|begin_of_text|>two", "completion": " four<|end_of_text|>"})
    (example,) = TASK.examples(record, renderer, 2048)
    assert example.tokens.tolist().count(renderer.eos_id) == 1
    assert example.tokens.tolist().count(renderer.bos_id) == 1
    (prompt,) = TASK.prompts(record, renderer)
    assert prompt.tokens.tolist() == example.tokens[: len(prompt.tokens)].tolist()


def test_train_on_prompt(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    task = task_for(CompletionConfig(train_on_prompt=True))
    (example,) = task.examples(task.parse(ROW), renderer, 2048)
    assert example.weights[0] == 0
    assert (example.weights[1:] == 1).all()


def test_truncation(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    record = TASK.parse(ROW)
    (whole,) = TASK.examples(record, renderer, 2048)
    num_prompt = int((whole.weights > 0).argmax())
    with pytest.raises(RowError) as caught:
        TASK.examples(record, renderer, num_prompt, "end")
    assert caught.value.kind == "truncated"
    (tail,) = TASK.examples(record, renderer, num_prompt, "start")
    assert tail.num_tokens == num_prompt
    assert tail.tokens[0] == renderer.bos_id
    assert tail.tokens[1:].tolist() == whole.tokens[1 - num_prompt :].tolist()
    assert TASK.examples(record, renderer, num_prompt, "drop") == []
    with pytest.raises(RowError):
        TASK.examples(record, renderer, num_prompt, "error")


def test_shots(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    record = TASK.parse(ROW)
    (prompt,) = TASK.prompts(record, renderer, shots=[record])
    assert prompt.text == "Query: two plus two?\nIntent: four\n\nQuery: two plus two?\nIntent:"
    assert prompt.tokens.tolist() == [renderer.bos_id, *renderer.encode(prompt.text)]


@pytest.mark.parametrize(
    ("row", "field", "kind"),
    [
        ({"prompt": "", "completion": "x"}, "prompt", "empty"),
        ({"prompt": "x", "completion": " "}, "completion", "empty"),
        ({"prompt": 4, "completion": "x"}, "prompt", "schema"),
        ({"prompt": "x", "completion": None}, "completion", "schema"),
    ],
)
def test_wrong_rows(row: dict[str, object], field: str, kind: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse(row)
    assert (caught.value.field, caught.value.kind) == (field, kind)


def test_records_go_through_json() -> None:
    record = TASK.parse(ROW)
    assert TASK.from_json(record.to_json()) == record
