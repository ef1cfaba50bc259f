"""Every call of the contract, by each of the official clients: sync and async, OpenAI's and Azure's."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types import Batch, FileObject, Model, Upload
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.uploads import UploadPart
from pydantic import TypeAdapter
from running import BASE, Service, chat_rows

ASK: Any = [{"role": "user", "content": "red"}]
SMALL: Any = {"train": {"max_steps": 2, "checkpoint_every": 1}, "method": {"type": "lora", "rank": 2}}
LONG: Any = {"train": {"epochs": 2000.0}, "method": {"type": "lora", "rank": 2}}


class Driver:
    """A client whose calls are made in one way, whether it is sync or async."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self(self.client.close())
        self._loop.close()

    def __call__(self, found: Any) -> Any:
        return self._loop.run_until_complete(_awaited(found)) if inspect.isawaitable(found) else found

    def strictly(self, kind: Any, found: Any) -> Any:
        """The answer, which holds by the client's own type, read strictly."""
        answer = self(found)
        TypeAdapter(kind).validate_json(json.dumps(answer.to_dict(mode="json")), strict=True)
        return answer

    def listed(self, found: Any) -> list[Any]:
        """All items of a list or a stream."""
        stream = self(found)
        return self._loop.run_until_complete(_collected(stream)) if hasattr(stream, "__aiter__") else list(stream)

    def job(self, job: str, *statuses: str) -> Any:
        deadline = time.monotonic() + 120
        while (found := self(self.client.fine_tuning.jobs.retrieve(job))).status not in statuses:
            assert time.monotonic() < deadline, found
            time.sleep(0.03)
        return found


async def _awaited(found: Any) -> Any:
    return await found


async def _collected(stream: Any) -> list[Any]:
    return [item async for item in stream]


KINDS: dict[str, Callable[..., Any]] = {
    "OpenAI": lambda url, key: openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0),
    "AsyncOpenAI": lambda url, key: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0),
    "AzureOpenAI": lambda url, key: openai.AzureOpenAI(
        azure_endpoint=url, api_key=key, api_version="2025-04-01-preview", max_retries=0
    ),
    "AsyncAzureOpenAI": lambda url, key: openai.AsyncAzureOpenAI(
        azure_endpoint=url, api_key=key, api_version="2025-04-01-preview", max_retries=0
    ),
    "Azure's v1": lambda url, key: openai.OpenAI(base_url=f"{url}/openai/v1", api_key=key, max_retries=0),
}


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, service: Service) -> Iterator[Driver]:
    driver = Driver(KINDS[request.param](service.url, service.keys["acme"]))
    yield driver
    driver.close()


def test_every_call(driver: Driver, service: Service) -> None:
    client, strictly, listed = driver.client, driver.strictly, driver.listed

    content = chat_rows(12)
    file = strictly(FileObject, client.files.create(file=("t.jsonl", content), purpose="fine-tune"))
    assert strictly(FileObject, client.files.retrieve(file.id)).filename == "t.jsonl"
    assert strictly(FileObject, client.files.wait_for_processing(file.id)).status == "processed"
    assert driver(client.files.content(file.id)).read() == content
    assert file.id in [found.id for found in listed(client.files.list(purpose="fine-tune", limit=2))]

    announced = {"filename": "p.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
    upload = strictly(Upload, client.uploads.create(bytes=len(content), **announced))
    parts = [content[:100], content[100:]]
    made = [strictly(UploadPart, client.uploads.parts.create(upload.id, data=part)).id for part in parts]
    md5 = hashlib.md5(content).hexdigest()
    whole = strictly(Upload, client.uploads.complete(upload.id, part_ids=made, md5=md5))
    given_up = strictly(Upload, client.uploads.create(bytes=5, **announced))
    assert strictly(Upload, client.uploads.cancel(given_up.id)).status == "cancelled"

    create = client.fine_tuning.jobs.create
    job = strictly(
        FineTuningJob,
        create(model=BASE, training_file=whole.file.id, metadata={"k": "é/&"}, extra_body={"luthier": SMALL}),
    )
    done = driver.job(job.id, "succeeded", "failed")
    strictly(FineTuningJob, client.fine_tuning.jobs.retrieve(job.id))
    assert job.id in [found.id for found in listed(client.fine_tuning.jobs.list(metadata={"k": "é/&"}))]
    for event in listed(client.fine_tuning.jobs.list_events(job.id, limit=2)):
        TypeAdapter(FineTuningJobEvent).validate_json(event.to_json(), strict=True)
    checkpoints = listed(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    for checkpoint in checkpoints:
        TypeAdapter(FineTuningJobCheckpoint).validate_json(checkpoint.to_json(), strict=True)
    assert driver(client.files.content(done.result_files[0])).read().startswith(b"step,")

    long = driver(create(model=BASE, training_file=file.id, extra_body={"luthier": LONG}))
    driver.job(long.id, "running")
    assert driver(client.fine_tuning.jobs.pause(long.id)).status == "paused"
    assert strictly(FineTuningJob, client.fine_tuning.jobs.resume(long.id)).status == "queued"
    assert strictly(FineTuningJob, client.fine_tuning.jobs.cancel(long.id)).status == "cancelled"

    name = checkpoints[-1].fine_tuned_model_checkpoint
    permissions, project = client.fine_tuning.checkpoints.permissions, service.context.tenants.get("other").id
    (given,) = listed(permissions.create(name, project_ids=[project]))
    assert [row.id for row in listed(permissions.list(name))] == [given.id]
    assert [row.id for row in driver(permissions.retrieve(name)).data] == [given.id]
    assert driver(permissions.delete(given.id, fine_tuned_model_checkpoint=name)).deleted

    for model in (done.fine_tuned_model, name, BASE):
        answer = strictly(ChatCompletion, client.chat.completions.create(model=model, messages=ASK, max_tokens=3))
        assert answer.model == model
        assert 1 <= answer.usage.completion_tokens <= 3, "sampled, so that a reply may end early"
    stream = listed(client.chat.completions.create(model=name, messages=ASK, max_tokens=3, stream=True))
    assert stream[-1].choices[0].finish_reason in ("length", "stop")
    strictly(Completion, client.completions.create(model=done.fine_tuned_model, prompt="the", max_tokens=3))

    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": BASE, "messages": ASK}}
    # So many that the batch is not over before it is cancelled.
    lines = "\n".join(json.dumps(line | {"custom_id": str(index)}) for index in range(100))
    asked = driver(client.files.create(file=("b.jsonl", lines.encode()), purpose="batch"))
    batch = strictly(
        Batch,
        client.batches.create(
            input_file_id=asked.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
        ),
    )
    assert batch.id in [found.id for found in listed(client.batches.list(limit=1))]
    assert strictly(Batch, client.batches.retrieve(batch.id)).status in ("validating", "in_progress")
    assert strictly(Batch, client.batches.cancel(batch.id)).status == "cancelling"

    assert strictly(Model, client.models.retrieve(done.fine_tuned_model)).id == done.fine_tuned_model
    assert {BASE, done.fine_tuned_model} <= {found.id for found in listed(client.models.list())}
    assert driver(client.models.delete(done.fine_tuned_model)).deleted
    assert driver(client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        driver(client.files.retrieve(file.id))
    assert gone.value.request_id


def test_what_is_not_served_is_said_in_a_sentence(driver: Driver) -> None:
    client = driver.client
    grader: Any = {"type": "string_check", "name": "n", "input": "i", "reference": "r", "operation": "eq"}
    calls = {
        "Embeddings": lambda: client.embeddings.create(model=BASE, input="x"),
        "Responses": lambda: client.responses.create(model=BASE, input="x"),
        "Evals": lambda: client.evals.list(),
        "Graders": lambda: client.fine_tuning.alpha.graders.validate(grader=grader),
        "graded": lambda: client.fine_tuning.alpha.graders.run(grader=grader, model_sample="x"),
        "Images": lambda: client.images.generate(model=BASE, prompt="x"),
        "Audio": lambda: client.audio.speech.create(model=BASE, voice="alloy", input="x"),
        "Assistants": lambda: client.beta.assistants.list(),
        "Reinforcement": lambda: client.fine_tuning.jobs.create(
            model=BASE, training_file="file-x", method={"type": "reinforcement", "reinforcement": {"grader": grader}}
        ),
    }
    for what, call in calls.items():
        with pytest.raises(openai.NotFoundError, match=f"(?s){what}.*\\.") as refused:
            driver(call())
        assert refused.value.type == "invalid_request_error"
