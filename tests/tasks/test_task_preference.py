"""task: preference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.preference.metrics import pair_ratios
from luthier.tasks.preference.schema import PreferenceConfig
from luthier.tasks.registry import head_of, task_for
from luthier.tasks.shapes import Shaper
from luthier.types import Example

TASK = task_for(PreferenceConfig(beta=0.3, label_smoothing=0.1))
PROMPT = [{"role": "user", "content": "How do I boil an egg?"}]
CHOSEN = {"role": "assistant", "content": "Eight minutes in boiling water."}
REJECTED = {"role": "assistant", "content": "No idea."}
OPENAI: dict[str, Any] = {
    "input": {"messages": PROMPT, "tools": [], "parallel_tool_calls": True},
    "preferred_output": [CHOSEN],
    "non_preferred_output": [REJECTED],
}
PLAIN = {"prompt": PROMPT[0]["content"], "chosen": CHOSEN["content"], "rejected": REJECTED["content"]}
CONVERSATIONS = {"chosen": [*PROMPT, CHOSEN], "rejected": [*PROMPT, REJECTED]}


def parse(row: dict[str, Any], **shape: Any) -> Any:
    return TASK.parse(Shaper("preference", **shape).shape(row))


def sides(example: Example) -> list[tuple[list[int], list[int]]]:
    """(prompt, reply) of either side."""
    assert example.pair is not None
    found, start = [], 0
    for length in example.lengths:
        part = slice(start, start + length)
        counts = example.weights[part] > 0
        found.append((example.tokens[part][~counts].tolist(), example.tokens[part][counts].tolist()))
        start += length
    return found


@pytest.mark.parametrize(
    "row",
    [
        OPENAI,
        PLAIN,
        CONVERSATIONS,
        {**CONVERSATIONS, "prompt": PROMPT[0]["content"]},
        {"prompt": PROMPT, "chosen": [CHOSEN], "rejected": [REJECTED], "score_chosen": 9.0},
        {"prompt": PROMPT, "chosen": [CHOSEN], "rejected": REJECTED["content"]},
    ],
)
def test_every_form_is_the_same_pair(row: dict[str, Any]) -> None:
    record = parse(row)
    assert (list(record.messages), record.chosen, record.rejected) == (PROMPT, CHOSEN, REJECTED)
    assert TASK.from_json(record.to_json()) == record


def test_columns_of_other_names_are_mapped() -> None:
    row = {"question": PLAIN["prompt"], "good": PLAIN["chosen"], "bad": PLAIN["rejected"]}
    assert parse(row, fields={"prompt": "question", "chosen": "good", "rejected": "bad"}) == parse(PLAIN)


def test_a_system_turn_comes_from_the_row_or_the_recipe() -> None:
    assert parse({**PLAIN, "system": "Be brief."}).messages[0] == {"role": "system", "content": "Be brief."}
    task = task_for(PreferenceConfig(system="Be kind."))
    assert task.parse(PLAIN).messages[0]["content"] == "Be kind."
    assert task.parse({**PLAIN, "system": "Be brief."}).messages[0]["content"] == "Be brief."
    assert len(task.parse({**PLAIN, "prompt": [{"role": "system", "content": "Own."}, *PROMPT]}).messages) == 2


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_both_sides_have_one_prompt_and_replies_count(family: str, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, family))
    record = parse(OPENAI)
    (example,) = TASK.examples(record, renderer, 2048, row=3)
    (chosen, rejected), (prompt,) = sides(example), TASK.prompts(record, renderer, row=3)
    assert chosen[0] == rejected[0] == prompt.tokens.tolist() == renderer.chat_prompt(PROMPT)
    assert renderer.decode(chosen[1]).strip() == CHOSEN["content"] == prompt.reference.strip()
    assert renderer.decode(rejected[1]).strip() == REJECTED["content"]
    assert chosen[1][-1] == rejected[1][-1] == renderer.end_of_turn_id
    assert example.pair is not None
    assert (example.row, example.pair.beta, example.pair.label_smoothing) == (3, 0.3, 0.1)
    assert np.isnan(example.pair.reference)


def test_the_prompts_own_assistant_turns_carry_no_loss(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    turns = [
        *PROMPT,
        {"role": "assistant", "content": "Hard or soft?", "weight": 1},
        {"role": "user", "content": "Hard."},
    ]
    record = parse({"prompt": turns, "chosen": CHOSEN["content"], "rejected": REJECTED["content"]})
    (example,) = TASK.examples(record, renderer, 2048)
    assert [renderer.decode(reply).strip() for _, reply in sides(example)] == [CHOSEN["content"], REJECTED["content"]]
    (prompt,) = TASK.prompts(record, renderer)
    assert prompt.reference.strip() == CHOSEN["content"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**OPENAI, "non_preferred_output": [CHOSEN]}, "non_preferred_output: is the same reply as preferred_output"),
        ({**PLAIN, "rejected": PLAIN["chosen"]}, "rejected: is the same reply as chosen"),
        ({k: v for k, v in OPENAI.items() if k != "non_preferred_output"}, "non_preferred_output: is missing"),
        ({k: v for k, v in PLAIN.items() if k != "chosen"}, "chosen: is missing"),
        ({**OPENAI, "preferred_output": []}, "preferred_output: is an empty list"),
        ({**OPENAI, "preferred_output": "yes"}, "preferred_output: is 'yes'"),
        ({**OPENAI, "preferred_output": PROMPT}, r"preferred_output\[0\].role: is 'user'; expected assistant"),
        ({**OPENAI, "preferred_output": [*PROMPT, CHOSEN]}, "preferred_output: holds 2 turns; expected one assistant"),
        (
            {**OPENAI, "preferred_output": [{"role": "asistant", "content": "x"}]},
            r"preferred_output\[0\].role: is .*mean",
        ),
        ({**OPENAI, "input": {"message": PROMPT}}, "input.messages: is missing.*did you mean"),
        (
            {**OPENAI, "input": {"messages": [*PROMPT, CHOSEN]}},
            r"input.messages\[1\].role: is 'assistant', and the reply",
        ),
        ({**OPENAI, "input": {"messages": [*PROMPT, *PROMPT]}}, r"input.messages\[1\].role: two user turns"),
        ({**OPENAI, "input": "hello"}, "input: is 'hello'"),
        ({"chosen": "a", "rejected": "b"}, "prompt: is missing"),
        ({**PLAIN, "chosen": "  "}, "chosen: is empty"),
        ({**PLAIN, "rejected": 3}, "rejected: is 3"),
        ({**CONVERSATIONS, "rejected": [{"role": "user", "content": "Hi"}, REJECTED]}, "rejected: does not begin as"),
        ({**CONVERSATIONS, "prompt": "Something else"}, "prompt: is not what `chosen` and `rejected` hold"),
        ({**CONVERSATIONS, "chosen": PROMPT}, r"chosen\[0\].role: is 'user'"),
    ],
)
def test_what_does_not_hold_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse(row)


class TestLengths:
    """A pair with a side above max_length, by each policy; both sides of a pair share its fate."""

    @pytest.fixture
    def renderer(self, tmp_path: Path) -> Renderer:
        return Renderer.load(write_family(tmp_path, "chatml"))

    def lengths(self, renderer: Renderer, row: dict[str, Any]) -> tuple[int, int, int]:
        (example,) = TASK.examples(parse(row), renderer, 2048)
        (prompt, chosen), (_, rejected) = sides(example)
        return len(prompt), len(chosen), len(rejected)

    def test_a_pair_whose_sides_fit_is_kept_whole(self, renderer: Renderer) -> None:
        prompt, chosen, rejected = self.lengths(renderer, PLAIN)
        (example,) = TASK.examples(parse(PLAIN), renderer, prompt + max(chosen, rejected), "error")
        assert example.num_tokens == 2 * prompt + chosen + rejected  # more than max_length, which is a side's

    def test_error_drop_end_and_start(self, renderer: Renderer) -> None:
        prompt, chosen, rejected = self.lengths(renderer, PLAIN)
        assert chosen > rejected + 2
        most = prompt + chosen - 2
        with pytest.raises(RowError, match=f"{prompt + chosen} tokens"):
            TASK.examples(parse(PLAIN), renderer, most, "error")
        assert TASK.examples(parse(PLAIN), renderer, most, "drop") == []
        (whole,) = TASK.examples(parse(PLAIN), renderer, 2048)
        (end,) = TASK.examples(parse(PLAIN), renderer, most, "end")
        (start,) = TASK.examples(parse(PLAIN), renderer, most, "start")
        (p, c), (_, r) = sides(whole)
        assert sides(end) == [(p, c[:-2]), (p, r)]
        assert sides(start) == [(p[2:], c), (p[2:], r)]

    def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn(self, renderer: Renderer) -> None:
        prompt, chosen, _ = self.lengths(renderer, PLAIN)
        with pytest.raises(RowError, match="leaves no reply") as caught:
            TASK.examples(parse(PLAIN), renderer, prompt, "end")
        assert caught.value.kind == "truncated"
        with pytest.raises(RowError, match="leaves no prompt"):
            TASK.examples(parse(PLAIN), renderer, chosen - 1, "start")

    def test_sides_that_are_the_same_once_cut_are_refused(self, renderer: Renderer) -> None:
        row = {
            **PLAIN,
            "chosen": "The same words at first, then good.",
            "rejected": "The same words at first, then bad.",
        }
        prompt, _, _ = self.lengths(renderer, row)
        with pytest.raises(RowError, match="both sides are the same") as caught:
            TASK.examples(parse(row), renderer, prompt + 3, "end")
        assert caught.value.kind == "truncated"

    def test_replies_that_the_template_writes_alike_are_refused(self, tmp_path: Path) -> None:
        folder = write_family(tmp_path, "llama3")
        renderer = Renderer.load(folder)
        row = {**PLAIN, "chosen": "Yes.", "rejected": "Yes. "}
        with pytest.raises(RowError, match="writes both replies alike"):
            TASK.examples(parse(row), renderer, 2048)


def test_a_row_to_predict_for_needs_its_prompt_alone(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    for row in ({"prompt": PLAIN["prompt"]}, {"input": OPENAI["input"]}, PLAIN, OPENAI):
        record = TASK.parse_query(Shaper("preference").shape(row, is_query=True))
        (prompt,) = TASK.prompts(record, renderer)
        assert prompt.tokens.tolist() == renderer.chat_prompt(PROMPT)
    assert TASK.present(record, "Eight minutes.") == {"reply": "Eight minutes."}
    with pytest.raises(RowError, match="prompt: is missing"):
        TASK.parse_query(Shaper("preference").shape({"text": "?"}, is_query=True))


def test_a_pair_adds_to_three_scores() -> None:
    assert pair_ratios(-3.0, -4.0, -0.2) == {
        "preference_accuracy": (0.0, 1.0),
        "reward_margin": (-0.2, 1.0),
        "ranking_accuracy": (1.0, 1.0),
    }
    assert pair_ratios(-4.0, -3.0, 0.0)["preference_accuracy"] == (0.5, 1.0)  # the reference itself: neither


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": 2.5}, {"beta": float("nan")}, {"label_smoothing": 0.5}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PreferenceConfig(**options)


def test_the_task_writes_and_has_no_head() -> None:
    assert head_of(TASK) is None
    assert TASK.generates
    marks = TASK.mark(parse(PLAIN), "Boil it.", "Eight minutes in boiling water.")
    assert (marks.reply, marks.is_right, marks.is_exact) == ("Boil it.", None, None)
