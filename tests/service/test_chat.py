"""Chat: streams, log-probabilities, seeds, stops, choices, tools, JSON by a schema, head models."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter
from running import BASE, Service, chat_rows, post_by_hand, wait_for, wait_until

ASK: Any = [{"role": "user", "content": "red green blue"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "set_lamp",
        "description": "Switches a lamp.",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


def strictly(kind: Any, value: Any) -> None:
    TypeAdapter(kind).validate_json(json.dumps(value.to_dict(mode="json")), strict=True)


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": BASE, "messages": ASK, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    strictly(ChatCompletion, whole)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        strictly(ChatCompletionChunk, chunk)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": BASE, "messages": ASK, "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    strictly(ChatCompletion, whole)
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content or []
    assert len(entries) == 5
    assert all(len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    streamed = [
        entry.token
        for chunk in client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == [entry.token for entry in entries]
    with pytest.raises(openai.BadRequestError, match="logprobs=true"):
        client.chat.completions.create(**ask, top_logprobs=3)


def test_seed_choices_and_stop(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": BASE, "messages": ASK, "max_tokens": 8, "temperature": 1.0, "seed": 5, "n": 3}
    first, again = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    greedy: dict[str, Any] = {"model": BASE, "messages": ASK, "max_tokens": 12, "temperature": 0}
    text = client.chat.completions.create(**greedy).choices[0].message.content or ""
    cut = client.chat.completions.create(**greedy, stop=[text[3:5]]).choices[0]
    assert cut.message.content == text[: text.index(text[3:5])]
    assert cut.finish_reason == "stop"


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"lamp": {"enum": ["red", "blue"]}, "on": {"type": "boolean"}},
        "required": ["lamp", "on"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model=BASE, messages=ASK, response_format=form, seed=seed, max_tokens=60, temperature=1.0
        )
        value = json.loads(answer.choices[0].message.content or "")
        assert value["lamp"] in ("red", "blue")
        assert isinstance(value["on"], bool)
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
    with pytest.raises(openai.BadRequestError, match="banana"):
        client.chat.completions.create(model=BASE, messages=ASK, response_format=bad)


def test_tools_become_tool_calls(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": BASE, "messages": ASK, "tools": [TOOL], "max_tokens": 150, "seed": 1}
    for choice in ("required", {"type": "function", "function": {"name": "set_lamp"}}):
        answer = client.chat.completions.create(**ask, tool_choice=choice)
        strictly(ChatCompletion, answer)
        assert answer.choices[0].finish_reason == "tool_calls"
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.function.name == "set_lamp"  # type: ignore[union-attr]
        assert isinstance(json.loads(call.function.arguments)["on"], bool)  # type: ignore[union-attr]
    deltas = [
        delta
        for chunk in client.chat.completions.create(**ask, tool_choice="required", stream=True)
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    assert [delta.index for delta in deltas] == [0]
    turns: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    assert client.chat.completions.create(model=BASE, messages=turns, tools=[TOOL], max_tokens=3).choices
    with pytest.raises(openai.BadRequestError, match="no tool"):
        client.chat.completions.create(**ask, tool_choice={"type": "function", "function": {"name": "x"}})


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "usr", "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": []},
        {"temperature": 3},
        {"top_p": 0},
        {"n": 0},
        {"max_tokens": 0},
        {"presence_penalty": 1},
        {"logit_bias": {"5": 1}},
        {"stop": ["a"] * 5},
        {"messages": [{"role": "user", "content": "red " * 2000}]},
    ],
)
def test_requests_that_do_not_hold(client: openai.OpenAI, values: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**({"model": BASE, "messages": ASK} | values))


def test_a_classifier_predicts_and_does_not_chat(client: openai.OpenAI) -> None:
    rows = [
        {"text": f"{w} lamp", "label": "warm" if w in ("red", "bright") else "cold"}
        for w in ("red", "blue", "dim", "bright")
    ] * 5
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("c.jsonl", content), purpose="fine-tune")
    own = {"task": "classification", "train": {"epochs": 20.0, "learning_rate": 1e-2, "batch_size": 4}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, seed=1, extra_body={"luthier": own})
    done = wait_for(job.id, client)
    assert done.status == "succeeded", done.error
    body = {"model": done.fine_tuned_model, "input": ["red lamp", "blue lamp"]}
    answer = client.post("/luthier/predict", cast_to=httpx.Response, body=body).json()
    assert [row["label"] for row in answer["data"]] == ["warm", "cold"]
    assert sum(answer["data"][0]["probabilities"].values()) == pytest.approx(1.0)
    with pytest.raises(openai.BadRequestError, match="predict"):
        client.chat.completions.create(model=str(done.fine_tuned_model), messages=ASK)
    with pytest.raises(openai.BadRequestError, match="tuned for no task"):
        client.post("/luthier/predict", cast_to=httpx.Response, body={"model": BASE, "input": "x"})


def test_a_model_of_several_labels_predicts_them_from_its_threshold_on(client: openai.OpenAI) -> None:
    warm, dim = {"red", "bright"}, {"dim", "red"}
    rows = [
        {"text": f"{w} lamp", "label": [name for name, words in (("warm", warm), ("dim", dim)) if w in words]}
        for w in ("red", "blue", "dim", "bright")
    ] * 5
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("c.jsonl", content), purpose="fine-tune")
    task = {"type": "classification", "multiple": True, "threshold": 0.4}
    own = {"task": task, "train": {"epochs": 25.0, "learning_rate": 1e-2, "batch_size": 4}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, seed=1, extra_body={"luthier": own})
    done = wait_for(job.id, client)
    assert done.status == "succeeded", done.error
    body = {"model": done.fine_tuned_model, "input": ["red lamp", "blue lamp", "dim lamp"]}
    answer = client.post("/luthier/predict", cast_to=httpx.Response, body=body).json()
    assert [sorted(row["labels"]) for row in answer["data"]] == [["dim", "warm"], [], ["dim"]]
    for row in answer["data"]:
        assert set(row["labels"]) == {label for label, p in row["probabilities"].items() if p >= 0.4}


def test_a_tuned_model_answers_as_it_was_tuned(client: openai.OpenAI) -> None:
    rows = [{"messages": [*ASK, {"role": "assistant", "content": "door"}]}] * 12
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("c.jsonl", content), purpose="fine-tune")
    own = {"train": {"epochs": 25.0, "learning_rate": 5e-3, "batch_size": 4, "checkpoint_every": 20}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, seed=1, extra_body={"luthier": own})
    done = wait_for(job.id, client)
    assert done.status == "succeeded", done.error
    answer = client.chat.completions.create(model=str(done.fine_tuned_model), messages=ASK, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content == "door"
    assert answer.choices[0].finish_reason == "stop"
    assert (
        client.chat.completions.create(model=BASE, messages=ASK, temperature=0, max_tokens=8).choices[0]
        != answer.choices[0]
    )


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_caller_that_goes_away_frees_its_place_and_pays_for_what_was_written(
    service: Service, client: openai.OpenAI, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.chat.completions.create(model=BASE, messages=ASK, max_tokens=1)  # the worker is there
    key, tenant = service.tenant(f"hasty{stream:d}"), service.context.tenants.get(f"hasty{stream:d}").id
    body = {"model": BASE, "messages": ASK, "max_tokens": 400, "temperature": 1.0, "stop": ["never"], "stream": stream}
    # What no token ends: the schema's text has room for all of them.
    text = {"type": "object", "properties": {"a": {"type": "string", "minLength": 5000}}, "required": ["a"]}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": text}}
    monkeypatch.setattr("luthier.service.routes.chat.LISTEN_SECONDS", 0.02)
    replies, step = service.worker._replies, service.worker._replies.step

    def slowly() -> None:
        time.sleep(0.01)
        step()

    # So slow that it is seen to be gone before the last token.
    monkeypatch.setattr(replies, "step", slowly)
    wait_until(lambda: replies.num_open == 0)  # what other tests left behind
    with post_by_hand(service, key, "/v1/chat/completions", body):
        wait_until(lambda: any(task.num_tokens[0] > 40 for task in list(replies._tasks.values())))
    wait_until(lambda: replies.num_open == 0)
    wait_until(lambda: bool(service.context.usage.by_day(tenant)))
    (row,) = service.context.usage.by_day(tenant)
    assert row["prompt_tokens"] > 0
    assert 0 < row["generated_tokens"] < 400


def test_a_worker_that_is_full_says_when_to_come_back(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.worker.endpoint.MAX_WAITING", 0)
    with pytest.raises(openai.RateLimitError, match="wait already") as refused:
        client.chat.completions.create(model=BASE, messages=ASK, stream=True)
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 120


def test_any_json_object(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = client.chat.completions.create(model=BASE, messages=ASK, response_format=form, seed=2, max_tokens=200)
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_usage_is_counted_once_and_shown(service: Service) -> None:
    # Of a tenant whose batches nobody else has running.
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.tenant("counted"), max_retries=0)

    def counted() -> int:
        rows = client.get("/luthier/usage", cast_to=httpx.Response).json()["data"]
        return sum(row["generated_tokens"] for row in rows if row["model"] == BASE)

    before = counted()
    answer = client.chat.completions.create(model=BASE, messages=ASK, max_tokens=7, n=2, temperature=1.0)
    assert answer.usage is not None
    assert counted() == before + answer.usage.completion_tokens


def test_chat_goes_on_while_a_job_trains(
    service: Service, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checkpoints come fast here, and the one that is asked twice stays.
    monkeypatch.setattr("luthier.registry.work._retire", lambda session, job: [])

    def step() -> int:
        return int(client.fine_tuning.jobs.retrieve(job.id).to_dict()["luthier"]["step"])  # type: ignore[index, call-overload]

    file = client.files.create(file=("t.jsonl", chat_rows(40)), purpose="fine-tune")
    own = {"train": {"epochs": 3000.0, "checkpoint_every": 40, "learning_rate": 5e-3}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body={"luthier": own})
    wait_for(job.id, client, "running")
    before = step()
    for _ in range(5):
        started = time.monotonic()
        stream = client.chat.completions.create(model=BASE, messages=ASK, max_tokens=10, stream=True, temperature=1.0)
        next(iter(stream))
        assert time.monotonic() - started < 30.0  # and not when the job is done
        list(stream)
    wait_until(lambda: step() > before)
    # What answers is the checkpoint as it was, whatever its job has become meanwhile.
    wait_until(lambda: bool(client.fine_tuning.jobs.checkpoints.list(job.id).data))
    name = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    ask: dict[str, Any] = {"model": name, "messages": ASK, "max_tokens": 4, "temperature": 0, "logprobs": True}
    wait_until(lambda: service.worker._replies.num_open == 0)  # replies beside it would round otherwise
    said = client.chat.completions.create(**ask).choices[0]
    then = step()
    wait_until(lambda: step() > then + 1)
    assert client.chat.completions.create(**ask).choices[0] == said
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    client.fine_tuning.jobs.cancel(job.id)
