"""Tuned models of every task over /v1/luthier/predict, and which of them chat."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
from running import BASE, Service, post_by_hand, wait_for, wait_until

WARM = ("red", "bright")
COLORS = ("red", "blue", "dim", "bright")
LEARN = {"epochs": 25.0, "learning_rate": 1e-2, "batch_size": 4, "checkpoint_every": 40}
GLANCE = {"max_steps": 2}
Rows = list[dict[str, Any]]
LABELLED: Rows = [{"text": f"{w} lamp", "label": "warm" if w in WARM else "cold"} for w in COLORS]
TASKS: dict[str, tuple[Any, Rows, dict[str, Any]]] = {
    "words": (
        {"type": "classification", "head": "words", "instruction": "Warm?", "words": {"warm": "yes", "cold": "no"}},
        LABELLED * 4,
        LEARN,
    ),
    "tagging": (
        "tagging",
        [{"text": f"the {w} lamp", "spans": [{"start": 4, "end": 4 + len(w), "label": "color"}]} for w in COLORS] * 4,
        LEARN,
    ),
    "qa": ("qa", [{"context": f"the lamp is {w}", "question": "Which?", "answers": [w]} for w in COLORS] * 4, GLANCE),
    "choices": (
        {"type": "qa", "choices": ["yes", "no"]},
        [{"context": f"a {w} lamp", "question": "Warm?", "answers": "yes" if w in WARM else "no"} for w in COLORS] * 4,
        GLANCE,
    ),
    "translation": (
        {"type": "translation", "source_lang": "en", "target_lang": "de"},
        [{"source": f"{w} lamp", "target": f"{w} door"} for w in COLORS] * 4,
        GLANCE,
    ),
    "completion": ("completion", [{"prompt": f"the {w}", "completion": " lamp"} for w in COLORS] * 4, GLANCE),
    "text": ("text", [{"text": f"the {w} lamp"} for w in COLORS] * 4, GLANCE),
}


@pytest.fixture(scope="module")
def tuned(service: Service) -> dict[str, Any]:
    """A job of each task that succeeded; all train together."""
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys["acme"], max_retries=0)
    jobs = {}
    for name, (task, rows, train) in TASKS.items():
        content = "\n".join(map(json.dumps, rows)).encode()
        file = client.files.create(file=("t.jsonl", content), purpose="fine-tune")
        own = {"task": task, "train": train, "method": {"type": "lora", "rank": 4}}
        jobs[name] = client.fine_tuning.jobs.create(
            model=BASE, training_file=file.id, seed=1, extra_body={"luthier": own}
        )
    done = {name: wait_for(job.id, client, seconds=120) for name, job in jobs.items()}
    assert {job.status for job in done.values()} == {"succeeded"}, [job.error for job in done.values()]
    return done


def predict(client: openai.OpenAI, model: str, rows: Any, **values: Any) -> dict[str, Any]:
    body = {"model": model, "input": rows, **values}
    answer: dict[str, Any] = client.post("/luthier/predict", cast_to=httpx.Response, body=body).json()
    return answer


def say(client: openai.OpenAI, model: str, text: str) -> str:
    messages: Any = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=6)
    return answer.choices[0].message.content or ""


def test_a_tagger_names_entities(client: openai.OpenAI, tuned: dict[str, Any]) -> None:
    name = tuned["tagging"].fine_tuned_model
    answer = predict(client, name, ["the blue lamp", {"tokens": ["the", "dim", "lamp"]}])
    (blue,), (dim,) = (row["spans"] for row in answer["data"])
    assert (blue["label"], blue["text"], blue["start"], blue["end"]) == ("color", "blue", 4, 8)
    assert dim["text"] == "dim"
    assert answer["data"][1]["tags"] == ["O", "B-color", "O"]
    assert answer["usage"]["prompt_tokens"] > 0
    with pytest.raises(openai.BadRequestError, match="tagging model, which does not write"):
        say(client, name, "the blue lamp")


def test_a_classifier_by_words_predicts_and_writes_its_words(client: openai.OpenAI, tuned: dict[str, Any]) -> None:
    job = tuned["words"]
    assert job.to_dict()["luthier"]["evaluation"] is not None
    rows = predict(client, job.fine_tuned_model, ["red lamp", {"text": "blue lamp"}])["data"]
    assert [row["label"] for row in rows] == ["warm", "cold"]
    assert list(rows[0]["probabilities"]) == ["cold", "warm"]
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1.0)
    assert say(client, job.fine_tuned_model, "Warm?\n\nred lamp") == "yes"


@pytest.mark.parametrize(
    ("name", "row", "rendered", "key"),
    [
        (
            "qa",
            {"context": "the lamp is red", "question": "Which?"},
            "Answer the question with a few words from the text.\n\nthe lamp is red\n\nQuestion: Which?",
            "answer",
        ),
        ("translation", "red lamp", "Translate from English to German:\n\nred lamp", "translation"),
    ],
)
def test_rows_are_rendered_as_in_training_and_chat_takes_the_rendered_text(
    client: openai.OpenAI, tuned: dict[str, Any], name: str, row: Any, rendered: str, key: str
) -> None:
    model = tuned[name].fine_tuned_model
    answer = predict(client, model, [row] * 20, max_tokens=6)
    assert len({json.dumps(found[key]) for found in answer["data"]}) == 1
    said = say(client, model, rendered)
    assert (answer["data"][0][key] or "") == said.strip()
    assert [found["index"] for found in answer["data"]] == list(range(20))
    assert answer["data"][0].get("finish_reason") == "length"
    assert answer["usage"]["completion_tokens"] == 20 * 6


def test_the_other_tasks_answer_as_luthier_predict_does(client: openai.OpenAI, tuned: dict[str, Any]) -> None:
    rows = [{"context": f"a {w} lamp", "question": "Warm?"} for w in COLORS]
    found = predict(client, tuned["choices"].fine_tuned_model, rows)["data"]
    assert {row["answer"] for row in found} <= {"yes", "no"}
    (completed,) = predict(client, tuned["completion"].fine_tuned_model, "the red", max_tokens=3)["data"]
    assert isinstance(completed["completion"], str)
    (text,) = predict(client, tuned["text"].fine_tuned_model, "the red lamp")["data"]
    assert text["loss"] > 0
    assert text["num_tokens"] > 0


def test_a_checkpoint_predicts_too(client: openai.OpenAI, tuned: dict[str, Any]) -> None:
    checkpoints = client.fine_tuning.jobs.checkpoints.list(tuned["tagging"].id).data
    answer = predict(client, checkpoints[-1].fine_tuned_model_checkpoint, "the blue lamp")
    assert answer["data"][0]["tags"][0] == "O"


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("qa", ["a text"], "input\\[0\\] is a text; expected an object: a row of task qa"),
        ("qa", [{"context": "c", "question": "q"}, {"context": "c"}], "input\\[1\\].question is missing"),
        ("tagging", [{"words": "x"}], "input\\[0\\] the columns are words"),
        ("tagging", [""], "input\\[0\\]"),
        ("tagging", [], "input"),
        ("qa", [{"context": "red " * 2000, "question": "q"}], "input\\[0\\] has [0-9,]+ tokens"),
        ("words", [{"text": 5}], "input\\[0\\].text"),
    ],
)
def test_a_row_that_does_not_hold_is_named(
    client: openai.OpenAI, tuned: dict[str, Any], name: str, rows: Any, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        predict(client, tuned[name].fine_tuned_model, rows)


def test_a_caller_that_goes_away_stops_its_replies(
    service: Service, tuned: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replies, begin, begun = service.worker._replies, service.worker._replies.begin, []

    def noted(task: Any) -> None:
        begun.append(task)
        begin(task)

    def is_quiet() -> bool:
        if replies.num_open:
            return False
        time.sleep(0.5)  # rows of one length end together, and then the next begin
        return bool(replies.num_open == 0)

    wait_until(is_quiet)
    monkeypatch.setattr(replies, "begin", noted)
    body = {"model": tuned["completion"].fine_tuned_model, "input": ["the red"] * 200, "max_tokens": 400}
    with post_by_hand(service, service.keys["acme"], "/v1/luthier/predict", body):
        wait_until(lambda: replies.num_open > 0)
    wait_until(is_quiet)
    assert 0 < len(begun) < 200, "the rows that waited are not begun"


def test_a_base_predicts_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tuned for no task"):
        predict(client, BASE, "x")
