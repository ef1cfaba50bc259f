"""Which tokens carry loss, for templates of many habits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_templates import FAMILIES, write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write_family(root / name, name) for name in FAMILIES}


@pytest.fixture(scope="session")
def renderers(folders: dict[str, Path]) -> dict[str, Renderer]:
    return {name: Renderer.load(folder) for name, folder in folders.items()}


USER_1 = {"role": "user", "content": "What is the capital of France?"}
REPLY_1 = {"role": "assistant", "content": "The capital is Paris."}
USER_2 = {"role": "user", "content": "And the river there?"}
REPLY_2 = {"role": "assistant", "content": "It is the Seine."}
SYSTEM = {"role": "system", "content": "You are brief."}
TWO_TURNS = [USER_1, REPLY_1, USER_2, REPLY_2]


def supervised(renderer: Renderer, messages: list[dict[str, Any]], tools: Any = None) -> list[list[str]]:
    """The runs of supervised tokens of each example, decoded with their special tokens."""
    found = []
    for tokens, weights in renderer.chat_examples(messages, tools):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]])))
        found.append([renderer.decode(tokens[a:b], skip_special=False) for a, b in edges.reshape(-1, 2)])
    return found


ONE_EXAMPLE = {
    "chatml": "<|im_end|>",
    "generation-tag": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}


@pytest.mark.parametrize("name", ONE_EXAMPLE)
def test_each_reply_with_its_end_of_turn_is_supervised(name: str, renderers: dict[str, Renderer]) -> None:
    end = ONE_EXAMPLE[name]
    runs = supervised(renderers[name], TWO_TURNS)
    assert [[run.strip() for run in example] for example in runs] == [
        ["The capital is Paris." + end, "It is the Seine." + end]
    ]


def test_a_template_that_rewrites_earlier_turns_gives_an_example_a_turn(renderers: dict[str, Renderer]) -> None:
    thought = {"role": "assistant", "content": "<think>\nParis, of course.\n</think>\n\nThe capital is Paris."}
    assert supervised(renderers["qwen3"], [USER_1, thought, USER_2, REPLY_2]) == [
        ["<think>\nParis, of course.\n</think>\n\nThe capital is Paris.<|im_end|>"],
        ["<think>\n\n</think>\n\nIt is the Seine.<|im_end|>"],
    ]


def test_turns_that_are_not_rewritten_stay_in_one_example(renderers: dict[str, Renderer]) -> None:
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "lights", "arguments": {"on": True}}}],
    }
    messages = [USER_1, call, {"role": "tool", "content": "done"}, REPLY_1, USER_2, REPLY_2]
    examples = supervised(renderers["qwen3"], messages, [{"type": "function", "function": {"name": "lights"}}])
    # Reasoning is kept up to the next user turn, so the call and the reply after it are one sequence.
    assert [len(example) for example in examples] == [2, 1]
    assert examples[0][0].endswith('{"name": "lights", "arguments": {"on": true}}\n</tool_call><|im_end|>')


def test_an_end_of_turn_that_differs_in_history_is_trained_as_served(renderers: dict[str, Renderer]) -> None:
    reasoned = {**REPLY_2, "reasoning_content": "Rivers."}
    assert supervised(renderers["channels"], [USER_1, REPLY_1, USER_2, reasoned]) == [
        ["<|channel|>final<|message|>The capital is Paris.<|return|>"],
        [
            "<|channel|>analysis<|message|>Rivers.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is the Seine.<|return|>"
        ],
    ]


def test_a_prompt_that_opens_reasoning_is_followed_by_the_whole_reply(renderers: dict[str, Renderer]) -> None:
    thought = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nParis."}
    assert supervised(renderers["think-prompt"], [USER_1, thought, USER_2, REPLY_2]) == [
        ["Easy.\n</think>\n\nParis.</s>"],
        ["It is the Seine.</s>"],
    ]


def test_a_template_without_end_of_turn_is_given_eos(renderers: dict[str, Renderer]) -> None:
    assert supervised(renderers["no-end"], TWO_TURNS) == [
        [" The capital is Paris.<|endoftext|>"],
        [" It is the Seine.<|endoftext|>"],
    ]


def test_a_system_text_that_moves_to_the_last_turn_is_where_serving_has_it(renderers: dict[str, Renderer]) -> None:
    renderer = renderers["mistral"]
    messages = [SYSTEM, *TWO_TURNS]
    assert [[run.strip() for run in runs] for runs in supervised(renderer, messages)] == [
        ["The capital is Paris.</s>"],
        ["It is the Seine.</s>"],
    ]
    (first, _), (second, _) = renderer.chat_examples(messages)
    assert renderer.decode(first).count("You are brief.") == renderer.decode(second).count("You are brief.") == 1


def conversations(name: str) -> list[list[dict[str, Any]]]:
    odd = [
        {"role": "user", "content": "  Émile asks:\n\n\twhy?  "},
        {"role": "assistant", "content": "\n\nBecause 🎻.\n"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": " four"},
    ]
    plain = [TWO_TURNS, TWO_TURNS[:2], odd]
    return plain + ([[SYSTEM, *turns] for turns in plain] if FAMILIES[name].has_system else [])


@pytest.mark.parametrize("name", FAMILIES)
def test_training_equals_serving(name: str, renderers: dict[str, Renderer]) -> None:
    """The tokens before every supervised reply are exactly what a served model is given."""
    renderer = renderers[name]
    for messages in conversations(name):
        examples = renderer.chat_examples(messages)
        replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        edges = [
            (tokens, int(start), int(end))
            for tokens, weights in examples
            for start, end in np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]]))).reshape(-1, 2)
        ]
        assert len(edges) == len(replies)
        for k, (tokens, start, end) in zip(replies, edges, strict=True):
            assert tokens[:start].tolist() == renderer.chat_prompt(messages[:k])
            assert int(tokens[end - 1]) in renderer.stop_ids
            assert not set(tokens[start : end - 1].tolist()) & set(renderer.stop_ids)
            assert messages[k]["content"].strip() in renderer.decode(tokens[start:end])


@pytest.mark.parametrize("name", FAMILIES)
def test_remembered_pieces_are_tokenized_as_the_whole(name: str, renderers: dict[str, Renderer]) -> None:
    renderer = renderers[name]
    first, last = FAMILIES[name].tokens[0], renderer.stop_texts[-1]
    texts = [renderer.render_chat(messages) for messages in conversations(name)]
    texts += [
        last,
        last + last,
        f" {last}  \n{last} a",
        f"{first}{last}{first}x ",
        f"a{last}",
        last[:-1] + last + last[1:],
        "",
    ]
    for text in texts + texts[::-1]:
        assert renderer.encode_rendered(text) == renderer.encode(text)


def test_a_token_within_a_stop_token_is_not_lost(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "chatml")
    for odd in ("<|im_end|>\n<|im_start|>", "x<|im", "|>y", "m_e"):
        renderer = Renderer.load(folder, new_tokens=[odd])
        text = renderer.render_chat([*TWO_TURNS[:3], {"role": "assistant", "content": f"x{odd}y"}])
        assert renderer.encode_rendered(text) == renderer.encode(text)


@pytest.mark.parametrize("name", FAMILIES)
def test_bos_stands_once_or_not_at_all(name: str, renderers: dict[str, Renderer]) -> None:
    renderer, family = renderers[name], FAMILIES[name]
    bos_in_template = "bos_token" in family.template
    for tokens, weights in renderer.chat_examples(TWO_TURNS):
        if bos_in_template:
            assert family.bos is not None
            bos_id = renderer.token_id(family.bos)
            assert tokens[0] == bos_id
            assert tokens.tolist().count(bos_id) == 1
        assert weights[0] == 0
    assert renderer.bos_id == (renderer.token_id(family.bos) if family.bos and family.adds_bos else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_stop_ids_hold_eos_and_the_end_of_turn(name: str, renderers: dict[str, Renderer]) -> None:
    renderer, family = renderers[name], FAMILIES[name]
    assert set(renderer.stop_ids) == {renderer.token_id(token) for token in family.stops}
    assert renderer.eos_id == renderer.token_id(family.eos)


def test_weights_of_messages_are_kept(renderers: dict[str, Renderer]) -> None:
    renderer = renderers["chatml"]
    ((tokens, weights),) = renderer.chat_examples(
        [USER_1, {**REPLY_1, "weight": 0}, USER_2, {**REPLY_2, "weight": 0.5}]
    )
    assert renderer.decode(tokens[weights == 0.5], skip_special=False) == "It is the Seine.<|im_end|>"
    assert set(weights.tolist()) == {0.0, 0.5}
    ((tokens, weights),) = renderer.chat_examples([USER_1, REPLY_1, USER_2, {**REPLY_2, "weight": 0}])
    assert renderer.decode(tokens[weights == 1], skip_special=False) == "The capital is Paris.<|im_end|>"
    assert int(tokens[-1]) == renderer.eos_id  # nothing is learnt after it, so nothing follows


def test_dtypes_and_shapes(renderers: dict[str, Renderer]) -> None:
    for tokens, weights in renderers["chatml"].chat_examples(TWO_TURNS):
        assert tokens.dtype == np.int32
        assert weights.dtype == np.float32
        assert tokens.shape == weights.shape


def test_a_reply_with_the_end_of_turn_inside_is_refused(renderers: dict[str, Renderer]) -> None:
    with pytest.raises(RowError, match="at which a served model stops") as caught:
        renderers["chatml"].chat_examples([USER_1, {"role": "assistant", "content": "One<|im_end|>two"}])
    assert caught.value.field == "messages[1].content"


def test_a_reply_that_brings_its_own_end_of_turn_has_it_once(renderers: dict[str, Renderer]) -> None:
    runs = supervised(renderers["chatml"], [USER_1, {"role": "assistant", "content": "Paris.<|im_end|>"}])
    assert runs == [["Paris.<|im_end|>"]]


def test_a_template_that_refuses_says_so(renderers: dict[str, Renderer]) -> None:
    with pytest.raises(RowError, match="System role not supported") as caught:
        renderers["gemma"].chat_examples([SYSTEM, USER_1, REPLY_1])
    assert caught.value.kind == "template"


def test_calls_that_the_template_passes_over_are_refused(renderers: dict[str, Renderer]) -> None:
    call = {"role": "assistant", "content": "Wait.", "tool_calls": [{"function": {"name": "lights", "arguments": {}}}]}
    with pytest.raises(RowError, match="brings no `tools`"):
        renderers["gemma"].chat_examples([USER_1, call])


TOOL = {
    "type": "function",
    "function": {"name": "lights", "description": "Switch.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "abc123456", "type": "function", "function": {"name": "lights", "arguments": {"on": True}}}],
}
RESULT = {"role": "tool", "content": "done", "tool_call_id": "abc123456"}


def test_tools_of_a_template_that_knows_them(renderers: dict[str, Renderer]) -> None:
    (runs,) = supervised(renderers["llama3"], [USER_1, CALL, RESULT, REPLY_1], [TOOL])
    assert runs == ['{"name": "lights", "parameters": {"on": true}}<|eot_id|>', "The capital is Paris.<|eot_id|>"]


@pytest.mark.parametrize("name", ["chatml", "gemma", "phi3"])
def test_tools_of_a_template_that_knows_none(name: str, renderers: dict[str, Renderer]) -> None:
    renderer = renderers[name]
    messages = [USER_1, CALL, RESULT, REPLY_1, USER_2, REPLY_2]
    (runs,) = supervised(renderer, messages, [TOOL])
    assert runs[0].startswith('<tool_call>{"name": "lights", "arguments": {"on": true}}</tool_call>')
    text = renderer.render_chat(messages, [TOOL])
    assert text.count('"description": "Switch."') == 1
    assert text.count("<tool_response>done</tool_response>") == 1
    # Without tools the template is the base's own.
    assert renderer.render_chat(TWO_TURNS) == renderer.render_chat(TWO_TURNS, None)
    assert "functions" not in renderer.render_chat(TWO_TURNS)
