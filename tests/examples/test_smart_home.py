"""The quickstart's example: its rows hold to their own rules, and the held-out wordings are never seen in training."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from luthier.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "smart_home"
SPLITS = ("train", "test")
ROOMS = ("kitchen", "bedroom", "living room", "bathroom", "office", "hallway")
ROOM_ACTIONS = {
    "light": {"on", "off", "set", "brighter", "dimmer"},
    "blinds": {"open", "close", "set"},
    "heating": {"on", "off", "set", "warmer", "cooler"},
    "fan": {"on", "off", "set"},
    "speaker": {"on", "off", "set", "louder", "quieter", "play", "pause"},
    "TV": {"on", "off", "set", "louder", "quieter", "play", "pause"},
}
HOUSE_ACTIONS = {
    "all lights": {"on", "off", "set", "brighter", "dimmer"},
    "all blinds": {"open", "close", "set"},
    "front door": {"lock", "unlock"},
    "back door": {"lock", "unlock"},
    "garage door": {"open", "close"},
    "alarm": {"on", "off"},
    "oven": {"on", "off", "set"},
    "coffee maker": {"on", "off"},
    "dishwasher": {"on", "off"},
    "washing machine": {"on", "off"},
    "vacuum": {"on", "off"},
}
ALLOWED = HOUSE_ACTIONS | {f"{room} {device}": ROOM_ACTIONS[device] for room in ROOMS for device in ROOM_ACTIONS}
REFUSAL = '{"error":"unsupported"}'
# Numbers of a reply that a request may say in words.
IN_WORDS = {
    **{
        "3": ["three"],
        "5": ["five"],
        "10": ["ten"],
        "15": ["quarter of an hour"],
        "20": ["twenty"],
        "21": ["twenty-one"],
    },
    **{"30": ["half an hour"], "45": ["three quarters of an hour"], "50": ["half", "halfway"], "60": ["an hour"]},
    **{"90": ["an hour and a half"], "120": ["two hours"], "180": ["three hours"], "240": ["four hours"]},
}


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smart_home_build", EXAMPLE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = _load_build()


def _rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def _request(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def _reply(row: dict[str, Any]) -> str:
    return row["messages"][2]["content"]


def _masked(request: str) -> str:
    """A request with rooms, devices, values, times and genres masked; case, punctuation and "please" left out."""
    names = {text.lower() for fillings in BUILD.SLOTS.values() for text, _ in fillings}
    names |= {device.lower() for device in ROOM_ACTIONS} | set(HOUSE_ACTIONS) | {"lights"}
    text = request.lower()
    text = re.sub(r"\d[\d:]*( (am|pm)\b)?", "_", text)
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(name)}\b", "_", text)
    text = re.sub(r"\b(please|pls|pleese|thanks|percent|degrees|minutes|min)\b|[^\w\s]", " ", text)
    return " ".join(text.split())


@pytest.mark.parametrize("split", SPLITS)
def test_build_reproduces_the_committed_file_byte_for_byte(split: str) -> None:
    assert BUILD.text(split).encode() == (EXAMPLE / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize(("split", "least", "most"), [("train", 800, 1200), ("test", 80, 120)])
def test_there_are_enough_rows_and_no_request_twice(split: str, least: int, most: int) -> None:
    requests = [_request(row) for row in _rows(split)]
    assert least <= len(requests) <= most
    assert len(set(requests)) == len(requests)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_chat_rows_of_three_turns(split: str) -> None:
    for row in _rows(split):
        assert list(row) == ["messages"]
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == BUILD.SYSTEM
        assert _request(row) == _request(row).strip() != ""
        assert "{" not in _request(row)


@pytest.mark.parametrize("split", SPLITS)
def test_every_reply_is_in_canonical_form(split: str) -> None:
    for row in _rows(split):
        reply = json.loads(_reply(row))
        assert json.dumps(reply, ensure_ascii=False, separators=(",", ":")) == _reply(row)
        if isinstance(reply, dict):
            assert _reply(row) == REFUSAL
            continue
        assert 1 <= len(reply) <= 2
        for step in reply:
            _check_step(step)


def _check_step(step: dict[str, Any]) -> None:
    order = ["device", "action", "value", "at", "in"]
    assert [name for name in order if name in step] == list(step)
    assert step["action"] in ALLOWED[step["device"]]
    if "value" in step or step["action"] == "set":
        assert step["action"] in ("set", "play")
    if step["action"] == "set":
        highest = {"oven": 250, "fan": 5}.get(step["device"].split()[-1], 100)
        assert 1 <= step["value"] <= highest
    if step["action"] == "play":
        assert isinstance(step.get("value", ""), str)
    assert not {"at", "in"} <= set(step)
    assert 1 <= step.get("in", 1) <= 240


def test_every_value_of_a_reply_was_said_in_the_request() -> None:
    for row in _rows("train") + _rows("test"):
        reply = json.loads(_reply(row))
        for step in reply if isinstance(reply, list) else []:
            for name in {"value", "at", "in"} & set(step):
                value = str(step[name])
                ways = [value, *(IN_WORDS.get(value, []) if name != "at" else [])]
                assert any(re.search(rf"\b{re.escape(way)}\b", _request(row), re.IGNORECASE) for way in ways), row


def test_held_out_wordings_do_not_repeat_in_training() -> None:
    trained = {_masked(_request(row)) for row in _rows("train")}
    repeated = [_request(row) for row in _rows("test") if _masked(_request(row)) in trained]
    assert repeated == []


def test_held_out_wordings_do_not_repeat_among_themselves() -> None:
    masked = [_masked(_request(row)) for row in _rows("test")]
    assert len(set(masked)) == len(masked)


def test_the_mask_hides_what_a_slot_may_hold() -> None:
    assert _masked("Set the kitchen light to 40 percent, please.") == _masked("set the OFFICE fan to 5")
    assert _masked("Lock the front door at 7:30 am") == _masked("Lock the back door at midnight!")
    assert _masked("Open the kitchen blinds") != _masked("Close the kitchen blinds")


@pytest.mark.parametrize("split", SPLITS)
def test_refusals_several_steps_values_and_times_all_occur(split: str) -> None:
    rows = _rows(split)
    replies = [json.loads(_reply(row)) for row in rows]
    steps = [step for reply in replies if isinstance(reply, list) for step in reply]
    assert sum(_reply(row) == REFUSAL for row in rows) >= 0.1 * len(rows)
    assert sum(len(reply) > 1 for reply in replies if isinstance(reply, list)) >= 0.07 * len(rows)
    assert sum("value" in step for step in steps) >= 0.15 * len(steps)
    assert sum("at" in step or "in" in step for step in steps) >= 0.07 * len(steps)
    devices = {step["device"] for step in steps}
    assert {device.split()[-1] for device in devices} >= set(ROOM_ACTIONS)
    if split == "train":
        assert devices == set(ALLOWED)


def test_the_recipe_validates_and_names_the_rows() -> None:
    recipe = load_recipe(EXAMPLE / "recipe.yaml")
    assert recipe.task.type == "chat"
    assert recipe.method.type == "lora"
    assert isinstance(recipe.data.train, str)
    assert isinstance(recipe.data.validation, str)
    assert Path(recipe.data.train).resolve() == EXAMPLE / "train.jsonl"
    assert Path(recipe.data.validation).resolve() == EXAMPLE / "test.jsonl"
    assert recipe.evaluation.shots == 3
    # The longest reply of both files is 34 of the default base's tokens, its end of turn included.
    assert recipe.evaluation.max_new_tokens >= 34
    # The best of several checkpoints would be chosen by the rows that then judge it.
    assert not recipe.train.keep_best
    assert recipe.evaluation.rows == recipe.evaluation.generate_rows == len(_rows("test"))
