"""From the columns of a file to what a task parses."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.data.rows import RowError
from luthier.errors import RecipeError
from luthier.tasks.shapes import FORMATS, Shaper, convert, recognize, shape_row

EXCHANGE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["messages", "id"], "chat"),
        (["conversations"], "sharegpt"),
        (["completion", "prompt"], "prompt"),
        (["instruction", "input", "output"], "instruction"),
        (["text", "label"], "classification"),
        (["text"], "text"),
        (["question", "answer"], None),
        (["prompt"], None),
    ],
)
def test_formats_are_recognized_by_columns(columns: list[str], format: str | None) -> None:
    assert recognize(columns) == format


def test_the_task_decides_where_columns_fit_two_formats() -> None:
    assert recognize(["text", "label"], "text") == "text"
    assert recognize(["messages"], "completion") is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": EXCHANGE, "tools": [1], "id": 3}, {"messages": EXCHANGE, "tools": [1]}),
        ({"prompt": "q", "completion": "a"}, {"messages": EXCHANGE}),
        ({"instruction": "q", "input": "", "output": "a"}, {"messages": EXCHANGE}),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q\n\ni"},
                    {"role": "assistant", "content": "a"},
                ]
            },
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0.5}]},
            {"messages": [EXCHANGE[0], {**EXCHANGE[1], "weight": 0.5}]},
        ),
    ],
)
def test_rows_become_conversations(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert Shaper("chat").shape(row) == expected


def test_sharegpt_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "lights", "arguments": {"on": true}}'},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "lights"}]',
        "system": "s",
    }
    from luthier.tasks.chat.schema import ChatConfig
    from luthier.tasks.registry import task_for

    record = task_for(ChatConfig()).parse(Shaper("chat").shape(row))
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[2]["tool_calls"][0]["function"] == {"name": "lights", "arguments": {"on": True}}
    assert record.tools[0]["function"]["name"] == "lights"


def test_rows_become_completions_texts_and_classes() -> None:
    assert Shaper("completion").shape({"prompt": "q", "completion": "a"}) == {"prompt": "q", "completion": "a"}
    assert Shaper("completion").shape({"instruction": "q", "input": "i", "output": "a"}) == {
        "prompt": "### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n",
        "completion": "a",
    }
    assert Shaper("text").shape({"text": "t", "label": "l"}) == {"text": "t"}
    assert Shaper("text").shape("t") == {"text": "t"}
    assert Shaper("classification").shape({"text": "t", "label": 3, "x": 1}) == {"text": "t", "label": 3}
    assert shape_row({"text": "t"}, Shaper("text")) == convert({"text": "t"}, "text", "text") == {"text": "t"}


def test_fields_rename_columns() -> None:
    shaper = Shaper("completion", fields={"prompt": "question", "completion": "answer"})
    assert shaper.shape({"question": "q", "answer": "a"}) == {"prompt": "q", "completion": "a"}
    with pytest.raises(RowError, match="did you mean 'questions'"):
        shaper.shape({"questions": "q", "answer": "a"})


def test_templates_compose_columns() -> None:
    shaper = Shaper("completion", template={"prompt": "Q: {{ question }}\nA:", "completion": " {{ answer | trim }}"})
    row = {"question": "<q>", "answer": " a "}
    assert shaper.shape(row) == {"prompt": "Q: <q>\nA:", "completion": " a"}
    with pytest.raises(RowError, match="'answer' is undefined") as caught:
        shaper.shape({"question": "q"})
    assert caught.value.field == "completion"


def test_named_fields_decide_the_format() -> None:
    row = {"messages": EXCHANGE, "question": "q", "completion": "b"}
    shaped = Shaper("chat", fields={"prompt": "question"}).shape(row)
    assert shaped == {"messages": [EXCHANGE[0], {"role": "assistant", "content": "b"}]}
    assert Shaper("chat").shape(row) == {"messages": EXCHANGE}


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(RowError):
        Shaper("text", template={"text": "{{ x.__class__.__mro__ }}"}).shape({"x": "1"})


@pytest.mark.parametrize(
    ("task", "row", "field", "words"),
    [
        ("completion", {"prompt": "q", "completions": "a"}, "completion", "did you mean 'completions'"),
        ("completion", {"prompt": "q", "completion": None}, "completion", "is null"),
        ("chat", {"mesages": []}, "", "did you mean"),
        ("chat", {"question": "q"}, "", "data.fields"),
        ("chat", {"conversations": [{"from": "martian", "value": "x"}]}, "conversations[0].from", "martian"),
        ("chat", {"conversations": [{"from": "human"}]}, "conversations[0].value", "is missing"),
        ("chat", {"conversations": 3}, "conversations", "a list"),
        ("chat", {"prompt": 4, "completion": "x"}, "prompt", "a number"),
        ("classification", {"text": "x"}, "label", "is missing"),
        ("text", {}, "", "none"),
        ("text", ["x"], "", "an object"),
    ],
)
def test_rows_that_fit_no_format(task: str, row: Any, field: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        Shaper(task).shape(row)
    assert caught.value.field == field
    assert words in caught.value.message


def test_a_wrong_data_section_is_the_recipes_fault() -> None:
    with pytest.raises(RecipeError, match="does not go with task 'text'"):
        Shaper("text", format="chat")
    with pytest.raises(RecipeError, match="did you mean 'prompt'"):
        Shaper("completion", fields={"promt": "x"})
    with pytest.raises(RecipeError, match="does not parse"):
        Shaper("completion", template={"prompt": "{{ x"})


def test_every_format_of_a_recipe_is_known() -> None:
    from typing import get_args

    from luthier.recipe import DataConfig

    assert {"auto", *FORMATS} == set(get_args(DataConfig.model_fields["format"].annotation))
