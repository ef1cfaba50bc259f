"""A service over an encoder: taggers and classifiers are tuned and answer; nothing that writes is let in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from running import BASE, chat_rows, make_context, serving, wait_for, working
from tiny_models import write_tiny_encoder

LAMPS = ("red", "blue", "dim", "bright")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, service_database: Callable[[], str]) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("encoders")
    base = write_tiny_encoder(folder / "model", "roberta")
    context = make_context(folder, base, service_database())
    with serving(context) as running, working(context, folder / "worker") as running.worker:
        running.tenant("acme")
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.keys["acme"], max_retries=0) as client:
            yield client


def start(client: openai.OpenAI, content: bytes, **own: Any) -> Any:
    file = client.files.create(file=("t.jsonl", content), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=BASE, training_file=file.id, seed=1, extra_body={"luthier": own})


def test_jobs_train_together_and_answer_rows(encoder: openai.OpenAI) -> None:
    lamps = [{"text": f"{w} lamp", "label": "warm" if w in ("red", "bright") else "cold"} for w in LAMPS] * 4
    spans = [{"text": f"the {w} lamp", "spans": [{"start": 4, "end": 4 + len(w), "label": "color"}]} for w in LAMPS] * 4
    train = {"epochs": 12.0, "learning_rate": 5e-3, "batch_size": 4}
    method = {"type": "lora", "rank": 8}
    jobs = {
        task: start(encoder, "\n".join(map(json.dumps, rows)).encode(), task=task, train=train, method=method)
        for task, rows in (("classification", lamps), ("tagging", spans))
    }
    done = {task: wait_for(job.id, encoder, seconds=90) for task, job in jobs.items()}
    assert {job.status for job in done.values()} == {"succeeded"}, [job.error for job in done.values()]

    def predict(task: str, rows: list[Any]) -> list[dict[str, Any]]:
        body = {"model": done[task].fine_tuned_model, "input": rows}
        data: list[dict[str, Any]] = encoder.post("/luthier/predict", cast_to=httpx.Response, body=body).json()["data"]
        return data

    (row,) = predict("classification", ["red lamp"])
    assert row["label"] in ("warm", "cold")
    assert sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    (blue,) = predict("tagging", ["the blue lamp"])
    assert [(s["text"], s["label"]) for s in blue["spans"]] == [("blue", "color")]


def test_nothing_writes(encoder: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        encoder.completions.create(model=BASE, prompt="two lamps", max_tokens=3)
    assert "an encoder, which reads texts and does not write" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        encoder.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hello"}])
    assert "an encoder, which reads texts and does not write" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        start(encoder, chat_rows(12))
    assert "an encoder, which reads texts and does not write, and the task is chat" in str(caught.value)
