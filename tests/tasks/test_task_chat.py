"""task: chat - what is accepted, what is refused, and what a conversation becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.chat.metrics import exact_match
from luthier.tasks.chat.schema import ChatConfig
from luthier.tasks.registry import task_for

TASK = task_for(ChatConfig())
USER = {"role": "user", "content": "Hello"}
REPLY = {"role": "assistant", "content": "Good morning!"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "lights", "arguments": '{"on": true}'}}],
}
RESULT = {"role": "tool", "content": "", "tool_call_id": "a"}
TOOL = {"type": "function", "function": {"name": "lights", "parameters": {}}}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer.load(write_family(tmp_path_factory.mktemp("chat"), "chatml"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer.load(write_family(tmp_path_factory.mktemp("qwen"), "qwen3"))


def test_a_full_openai_row() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
            {**USER, "name": "ann", "id": 7},
            {**CALL, "weight": 0},
            RESULT,
            {**REPLY, "reasoning": "polite"},
        ],
        "tools": [TOOL, {"name": "bare"}],
        "source": "a web page",
    }
    record = TASK.parse(row)
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[0]["content"] == "Be short."
    assert record.messages[1] == {**USER, "name": "ann"}
    assert record.messages[2]["tool_calls"][0]["function"]["arguments"] == {"on": True}
    assert "content" not in record.messages[2]
    assert record.messages[2]["weight"] == 0.0
    assert record.messages[4]["reasoning_content"] == "polite"
    assert record.tools[1] == {"type": "function", "function": {"name": "bare"}}
    assert TASK.from_json(record.to_json()) == record


def test_columns_that_hold_json_text_and_nulls() -> None:
    row = {
        "messages": '[{"role": "user", "content": "Hello", "name": null}, {"role": "assistant", "content": "Hi"}]',
        "tools": None,
    }
    record = TASK.parse(row)
    assert record.messages == (USER, {"role": "assistant", "content": "Hi"})
    assert record.tools is None


def test_the_system_option_fills_in_where_there_is_none() -> None:
    task = task_for(ChatConfig(system="Be brief."))
    assert task.parse({"messages": [USER, REPLY]}).messages[0] == {"role": "system", "content": "Be brief."}
    own = {"role": "system", "content": "Be long."}
    assert task.parse({"messages": [own, USER, REPLY]}).messages[0] == own


REFUSED: list[tuple[Any, str, str, str]] = [
    ("Hello", "messages", "schema", "a list of"),
    ([], "messages", "empty", "empty list"),
    ([USER], "messages", "empty", "there is no assistant turn"),
    ([USER, {**REPLY, "weight": 0}], "messages", "empty", "weight above 0"),
    ([USER, "Hi"], "messages[1]", "schema", "an object"),
    ([REPLY], "messages[0].role", "schema", "before any user turn"),
    ([{"role": "system", "content": "x"}, REPLY], "messages[1].role", "schema", "before any user turn"),
    ([USER, USER, REPLY], "messages[1].role", "schema", "two user turns stand in a row"),
    ([USER, REPLY, REPLY], "messages[2].role", "schema", "two assistant turns stand in a row"),
    ([USER, {"role": "system", "content": "x"}, REPLY], "messages[1].role", "schema", "at place 2"),
    ([USER, REPLY, RESULT], "messages[2].role", "schema", "follows no tool call"),
    ([USER, {"role": "asistant", "content": "x"}], "messages[1].role", "schema", "did you mean 'assistant'"),
    ([USER, {"content": "x"}], "messages[1].role", "schema", "is missing"),
    ([USER, {"role": "assistant", "contents": "x"}], "messages[1].contents", "schema", "did you mean 'content'"),
    ([USER, {"role": "assistant"}], "messages[1].content", "schema", "is missing"),
    ([USER, {"role": "assistant", "content": None}], "messages[1].content", "empty", "is null"),
    ([USER, {"role": "assistant", "content": " \n"}], "messages[1].content", "empty", "is empty"),
    ([{"role": "user", "content": ""}, REPLY], "messages[0].content", "empty", "is empty"),
    ([USER, {"role": "assistant", "content": 4}], "messages[1].content", "schema", "a text"),
    ([{**USER, "content": [{"type": "image_url"}]}, REPLY], "messages[0].content[0]", "schema", "text parts"),
    ([USER, {**REPLY, "weight": -1}], "messages[1].weight", "schema", "0 for no loss"),
    ([USER, {**REPLY, "weight": True}], "messages[1].weight", "schema", "0 for no loss"),
    ([USER, {**REPLY, "weight": float("nan")}], "messages[1].weight", "schema", "0 for no loss"),
    ([{**USER, "weight": 1}, REPLY], "messages[0].weight", "schema", "on assistant turns only"),
    ([USER, {**CALL, "tool_calls": [{"name": "x"}]}], "messages[1].tool_calls[0]", "schema", '"function"'),
    (
        [USER, {**CALL, "tool_calls": [{"function": {"name": "x", "arguments": "{on}"}}]}],
        "messages[1].tool_calls[0].function.arguments",
        "schema",
        "not valid JSON",
    ),
    ([{**USER, "tool_calls": CALL["tool_calls"]}, REPLY], "messages[0].tool_calls", "schema", "assistant turns only"),
]


@pytest.mark.parametrize(("messages", "field", "kind", "words"), REFUSED)
def test_a_wrong_conversation_is_refused_by_field(messages: Any, field: str, kind: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse({"messages": messages})
    assert caught.value.field == field
    assert caught.value.kind == kind
    assert words in caught.value.message


def test_wrong_tools_are_refused() -> None:
    for tools in ("lights", {"name": "x"}, [{"function": {}}], ["x"]):
        with pytest.raises(RowError) as caught:
            TASK.parse({"messages": [USER, REPLY], "tools": tools})
        assert caught.value.field.startswith("tools")


def test_an_example_carries_its_row(renderer: Renderer) -> None:
    (example,) = TASK.examples(TASK.parse({"messages": [USER, REPLY]}), renderer, 2048, "end", row=5)
    assert example.row == 5
    assert renderer.decode(example.tokens[example.weights > 0]) == "Good morning!"


def test_truncation(renderer: Renderer) -> None:
    record = TASK.parse({"messages": [USER, REPLY, USER, {**REPLY, "content": "four " * 30}]})
    (whole,) = TASK.examples(record, renderer, 2048)
    first_label = int((whole.weights > 0).argmax())
    (cut,) = TASK.examples(record, renderer, first_label + 2, "end")
    assert cut.tokens.tolist() == whole.tokens[: first_label + 2].tolist()
    assert cut.weights.sum() == 2
    (tail,) = TASK.examples(record, renderer, 20, "start")
    assert tail.tokens.tolist() == whole.tokens[-20:].tolist()
    assert tail.weights[0] == 0
    assert tail.weights[1:].all()
    assert TASK.examples(record, renderer, 20, "drop") == []
    assert len(TASK.examples(record, renderer, whole.num_tokens, "drop")) == 1
    with pytest.raises(RowError, match="at most 20") as caught:
        TASK.examples(record, renderer, 20, "error")
    assert caught.value.kind == "truncated"
    with pytest.raises(RowError, match="nothing to learn") as caught:
        TASK.examples(record, renderer, first_label, "end")
    assert caught.value.kind == "truncated"


def test_truncation_keeps_bos(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    record = TASK.parse({"messages": [USER, REPLY, USER, REPLY]})
    (example,) = TASK.examples(record, renderer, 12, "start")
    assert example.num_tokens == 12
    assert example.tokens[0] == renderer.bos_id
    assert example.weights[0] == 0
    assert example.tokens[-1] == renderer.token_id("<|eot_id|>")


def test_truncation_of_one_of_several_examples(qwen: Renderer) -> None:
    record = TASK.parse({"messages": [USER, REPLY, {"role": "user", "content": "four " * 40}, REPLY]})
    first, second = TASK.examples(record, qwen, 2048)
    assert second.num_tokens > 60 > first.num_tokens
    # Cutting takes every label of the second, not of the first, which is still trained on.
    assert [e.num_tokens for e in TASK.examples(record, qwen, 60, "end")] == [first.num_tokens]
    assert [e.num_tokens for e in TASK.examples(record, qwen, 60, "drop")] == [first.num_tokens]


def test_the_prompt_is_that_of_serving(renderer: Renderer) -> None:
    messages = [USER, REPLY, {"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]
    (prompt,) = TASK.prompts(TASK.parse({"messages": messages}), renderer, row=3)
    assert prompt.tokens.tolist() == renderer.chat_prompt(messages[:3])
    assert prompt.reference == "four"
    assert prompt.row == 3
    assert prompt.text.endswith("<|im_start|>assistant\n")


def test_the_last_turn_with_a_weight_is_judged(renderer: Renderer) -> None:
    messages = [USER, REPLY, USER, {"role": "assistant", "content": "four", "weight": 0}, USER]
    (prompt,) = TASK.prompts(TASK.parse({"messages": messages}), renderer)
    assert prompt.reference == "Good morning!"


def test_shots_stand_in_front_as_turns(renderer: Renderer) -> None:
    system = {"role": "system", "content": "Be brief."}
    shot = TASK.parse({"messages": [{"role": "system", "content": "Other."}, USER, REPLY, USER]})
    record = TASK.parse({"messages": [system, USER, REPLY]})
    (prompt,) = TASK.prompts(record, renderer, shots=[shot, shot])
    assert prompt.tokens.tolist() == renderer.chat_prompt([system, USER, REPLY, USER, REPLY, USER])


def test_the_reference_is_what_a_perfect_model_would_write(qwen: Renderer) -> None:
    record = TASK.parse({"messages": [USER, REPLY]})
    (prompt,) = TASK.prompts(record, qwen)
    (example,) = TASK.examples(record, qwen, 2048)
    assert exact_match(qwen.decode(example.tokens[example.weights > 0]), prompt.reference)


def test_exact_match() -> None:
    assert exact_match(" four\n", "four")
    assert not exact_match("Four", "four")
    assert not exact_match("four.", "four")
