"""The OpenAI surface, driven by the official client alone; bodies validate strictly against the client's own types."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from typing import Any

import openai
import pytest
from openai.types import Batch, FileObject, Model, Upload
from openai.types.completion import Completion
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import TypeAdapter
from running import BASE, Service, chat_rows, pair_rows, wait_for

SMALL = {"method": {"type": "lora", "rank": 2}, "train": {"checkpoint_every": 2}, "validation": 0.2}


def strictly(kind: Any, value: Any) -> None:
    """The body holds by the client's type, read strictly."""
    TypeAdapter(kind).validate_json(json.dumps(value.to_dict(mode="json")), strict=True)


def upload(client: openai.OpenAI, content: bytes | None = None, name: str = "train.jsonl") -> FileObject:
    return client.files.create(file=(name, content or chat_rows(20)), purpose="fine-tune")


def create(client: openai.OpenAI, **values: Any) -> FineTuningJob:
    given: dict[str, Any] = {"model": BASE, "extra_body": {"luthier": SMALL}}
    given |= values
    if "training_file" not in given:
        given["training_file"] = upload(client).id
    return client.fine_tuning.jobs.create(**given)


@pytest.fixture(scope="module")
def tuned(service: Service) -> FineTuningJob:
    """A job that succeeded."""
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys["acme"], max_retries=0)
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}}
    # A name of its own: where tests of this module are not run in a row, the job is made again.
    team = f"light {secrets.token_hex(4)}"
    job = create(client, method=method, suffix="lamp", seed=7, metadata={"team": team})
    return wait_for(job.id, client)


def test_files(client: openai.OpenAI) -> None:
    content = chat_rows(12)
    file = upload(client, content)
    strictly(FileObject, file)
    assert (file.bytes, file.filename, file.status) == (len(content), "train.jsonl", "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert client.files.wait_for_processing(file.id).id == file.id
    deleted = client.files.delete(file.id)
    assert deleted.deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_files_are_listed_newest_first_page_by_page(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.tenant("pages"), max_retries=0)
    made = [upload(client).id for _ in range(5)]
    assert [file.id for file in client.files.list()] == made[::-1]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1], "the client walks the pages"
    assert [file.id for file in client.files.list(order="asc", limit=2)] == made
    page = client.files.list(limit=2)
    assert page.has_more
    assert client.files.list(purpose="batch").data == []


def test_an_expiring_file_says_when(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", chat_rows(2)), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        client.files.create(
            file=("a.jsonl", b"{}"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 5}
        )


def test_uploads_in_parts(client: openai.OpenAI) -> None:
    content = chat_rows(30)
    started = client.uploads.create(
        bytes=len(content), filename="parts.jsonl", mime_type="application/jsonl", purpose="fine-tune"
    )
    strictly(Upload, started)
    parts = [client.uploads.parts.create(started.id, data=piece).id for piece in (content[:500], content[500:])]
    done = client.uploads.complete(started.id, part_ids=parts, md5=hashlib.md5(content).hexdigest())
    strictly(Upload, done)
    assert done.file is not None
    assert client.files.content(done.file.id).read() == content
    given_up = client.uploads.create(bytes=5, filename="x.jsonl", mime_type="application/jsonl", purpose="fine-tune")
    assert client.uploads.cancel(given_up.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.uploads.complete(given_up.id, part_ids=[parts[0]])


def test_a_job_from_beginning_to_end(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    strictly(FineTuningJob, tuned)
    assert tuned.status == "succeeded", tuned.error
    assert tuned.fine_tuned_model is not None
    assert tuned.fine_tuned_model.startswith(f"ft:{BASE}:acme:lamp:")
    assert (tuned.hyperparameters.n_epochs, tuned.hyperparameters.batch_size) == (2, 4)
    assert tuned.hyperparameters.learning_rate_multiplier == 1.0
    assert tuned.seed == 7
    assert str((tuned.metadata or {})["team"]).startswith("light ")
    assert tuned.trained_tokens
    table = client.files.content(tuned.result_files[0]).read().decode().splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in table[1:]] == [str(n) for n in range(1, len(table))]
    assert all(0 <= float(line.split(",")[2]) <= 1 for line in table[1:]), "every step has its accuracy"
    assert 0 <= float(table[-1].split(",")[4]) <= 1
    own = tuned.to_dict()["luthier"]
    assert own["evaluation"]["num_rows"] > 0  # type: ignore[index]


def test_events_and_checkpoints(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(tuned.id, limit=3))
    for event in events:
        strictly(FineTuningJobEvent, event)
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message.startswith("Created")
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == len(steps)
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(tuned.id, limit=1))
    for checkpoint in checkpoints:
        strictly(FineTuningJobCheckpoint, checkpoint)
        assert checkpoint.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{checkpoint.step_number}")
        assert checkpoint.metrics.train_loss
        assert checkpoint.metrics.train_mean_token_accuracy is not None
    assert checkpoints[0].metrics.full_valid_mean_token_accuracy is not None
    assert len(checkpoints) >= 2


def test_jobs_are_listed_and_filtered(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    assert tuned.id in [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    found = client.fine_tuning.jobs.list(metadata=tuned.metadata or {}).data
    assert [job.id for job in found] == [tuned.id]
    assert client.fine_tuning.jobs.list(metadata={"team": "dark"}).data == []


def test_pause_resume_cancel(client: openai.OpenAI) -> None:
    long = {"train": {"epochs": 2000.0}, "method": {"type": "lora", "rank": 2}}
    job = create(client, extra_body={"luthier": long})
    wait_for(job.id, client, "running")
    assert str(client.fine_tuning.jobs.pause(job.id).status) == "paused"
    with pytest.raises(openai.BadRequestError, match="paused"):
        client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    wait_for(job.id, client, "running")
    done = client.fine_tuning.jobs.cancel(job.id)
    strictly(FineTuningJob, done)
    assert done.status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.fine_tuning.jobs.cancel(job.id)


def test_old_code_with_top_level_hyperparameters(client: openai.OpenAI) -> None:
    job = create(client, hyperparameters={"n_epochs": 1}, extra_body={"luthier": {"train": {"max_steps": 1}}})
    assert job.hyperparameters.n_epochs == 1
    assert job.hyperparameters.batch_size == 1
    assert wait_for(job.id, client).status == "succeeded"


def test_a_wrong_line_is_told_at_once(client: openai.OpenAI) -> None:
    lines = chat_rows(12).splitlines()
    lines[6] = b'{"messages": [{"role": "usr", "content": "x"}]}'
    lines[8] = b"{broken"
    file = upload(client, b"\n".join(lines))
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, training_file=file.id)
    assert (refused.value.code, refused.value.param) == ("invalid_training_file", "training_file")
    assert "train.jsonl, line 7" in refused.value.message
    assert "line 9" in refused.value.message
    assert "/" not in refused.value.message.replace("and/or", "")
    few = upload(client, chat_rows(9))
    with pytest.raises(openai.BadRequestError, match="at least 10"):
        create(client, training_file=few.id)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"model": "gpt-9"}, "model"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"training_file": "file-none"}, "id"),
        ({"hyperparameters": {"n_epochs": -1}}, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters"),
        ({"seed": -1}, "seed"),
        ({"suffix": "a" * 65}, "suffix"),
        ({"suffix": "a/b"}, "suffix"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"extra_body": {"luthier": {"base": "/etc"}}}, "luthier.base"),
        ({"extra_body": {"luthier": {"data": {"train": "/etc/passwd"}}}}, "luthier.data"),
        ({"extra_body": {"luthier": {"train": {"epoch": 1}}}}, "luthier"),
        ({"extra_body": {"luthier": {"train": {"epochs": -1}}}}, "luthier"),
        ({"extra_body": {"luthier": {"method": {"type": "lora", "rank": 0}}}}, "luthier"),
        ({"extra_body": {"lutier": {}}}, "lutier"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.5}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"gamma": 1}}}}, "method.dpo.hyperparameters.gamma"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    ],
)
def test_requests_that_do_not_hold(client: openai.OpenAI, values: dict[str, Any], param: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        create(client, **values)
    assert str(refused.value.param).startswith(param)
    assert refused.value.request_id


def test_a_dpo_job_learns_preferences(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    """Alone, with our own fields beside it, and going on from a model that learnt to chat."""
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2, "batch_size": 4}}}
    file = upload(client, pair_rows(20))
    for model in (BASE, str(tuned.fine_tuned_model)):
        own = SMALL if model == BASE else {"validation": 0.2}
        job = create(client, model=model, training_file=file.id, method=method, extra_body={"luthier": own})
        strictly(FineTuningJob, job)
        assert job.method is not None
        assert job.method.type == "dpo"
        assert job.method.supervised is None
        assert job.method.dpo is not None
        assert job.method.dpo.to_dict() == {
            "hyperparameters": {"beta": 0.3, "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
        }
        assert job.to_dict()["luthier"]["spec"]["task"] == {
            "type": "preference",
            "beta": 0.3,
            "label_smoothing": 0.0,
            "system": None,
        }
        done = wait_for(job.id, client)
        strictly(FineTuningJob, done)
        assert done.status == "succeeded"
        scores = done.to_dict()["luthier"]["evaluation"]["tuned"]
        assert set(scores) == {"loss", "preference_accuracy", "ranking_accuracy", "reward_margin"}
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        for event in events:
            strictly(FineTuningJobEvent, event)
        first = min((e for e in events if e.type == "metrics"), key=lambda e: e.data["step"])  # type: ignore[index]
        assert first.data["train_loss"] == pytest.approx(math.log(2), abs=1e-4)  # type: ignore[index]
        assert first.data["train_mean_token_accuracy"] == 0.5, "it begins where it is its own reference"  # type: ignore[index]
        assert all(0 <= e.data["train_mean_token_accuracy"] <= 1 for e in events if e.type == "metrics")  # type: ignore[index]
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
        for checkpoint in checkpoints:
            strictly(FineTuningJobCheckpoint, checkpoint)
        assert 0 <= float(str(checkpoints[0].metrics.full_valid_mean_token_accuracy)) <= 1
        asked: Any = [{"role": "user", "content": "red green blue"}]
        answer = client.chat.completions.create(model=str(done.fine_tuned_model), messages=asked, max_tokens=2)
        assert answer.choices[0].message.content is not None


def test_auto_in_a_dpo_job_becomes_what_the_answer_says(client: openai.OpenAI) -> None:
    file = upload(client, pair_rows(20))
    auto: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}
    job = create(client, training_file=file.id, method=auto, extra_body={"luthier": {"train": {"max_steps": 1}}})
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.to_dict()["hyperparameters"] == {
        "beta": 0.1,
        "n_epochs": 3,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }
    assert wait_for(job.id, client).status == "succeeded"


def test_pairs_and_conversations_are_never_taken_for_each_other(client: openai.OpenAI) -> None:
    pairs, chats = upload(client, pair_rows(12)), upload(client, chat_rows(12))
    dpo: Any = {"type": "dpo"}
    for values in ({"training_file": pairs.id}, {"training_file": chats.id, "method": dpo}):
        with pytest.raises(openai.BadRequestError, match="line 1") as refused:
            create(client, **values)
        assert (refused.value.code, refused.value.param) == ("invalid_training_file", "training_file")


def test_a_pair_that_does_not_hold_is_named_by_its_line(client: openai.OpenAI) -> None:
    lines = pair_rows(12).decode().splitlines()
    row = json.loads(lines[6])
    lines[6] = json.dumps({**row, "non_preferred_output": row["preferred_output"]})
    lines[8] = json.dumps({name: value for name, value in row.items() if name != "preferred_output"})
    file = upload(client, "\n".join(lines).encode())
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, training_file=file.id, method={"type": "dpo"})
    assert "line 7 (field non_preferred_output): is the same reply" in refused.value.message
    assert "line 9 (field preferred_output): is missing" in refused.value.message


def test_permissions_let_another_tenant_chat(
    client: openai.OpenAI, other: openai.OpenAI, service: Service, tuned: FineTuningJob
) -> None:
    checkpoint = client.fine_tuning.jobs.checkpoints.list(tuned.id).data[0].fine_tuned_model_checkpoint
    ask: dict[str, Any] = {"model": checkpoint, "messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.create(**ask)
    project = service.context.tenants.get("other").id
    (given,) = client.fine_tuning.checkpoints.permissions.create(checkpoint, project_ids=[project]).data
    assert given.project_id == project
    assert other.chat.completions.create(**ask).choices
    listed = client.fine_tuning.checkpoints.permissions.retrieve(checkpoint)
    assert [row.id for row in listed.data] == [given.id]
    assert client.fine_tuning.checkpoints.permissions.delete(given.id, fine_tuned_model_checkpoint=checkpoint).deleted
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.create(**ask)


def test_models(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    names = [model.id for model in client.models.list()]
    assert BASE in names
    assert tuned.fine_tuned_model in names
    for name in (BASE, str(tuned.fine_tuned_model)):
        model = client.models.retrieve(name)
        strictly(Model, model)
        assert model.id == name
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(BASE)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ft:none/with-a-slash")


def test_a_tuned_model_is_tuned_further_and_not_deleted_meanwhile(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    name = str(tuned.fine_tuned_model)
    more = {"method": {"type": "lora", "rank": 2}, "train": {"epochs": 500.0}}
    job = create(client, model=name, extra_body={"luthier": more})
    wait_for(job.id, client, "running")
    with pytest.raises(openai.BadRequestError, match="in use"):
        client.models.delete(name)
    client.fine_tuning.jobs.cancel(job.id)
    short = create(client, model=name, extra_body={"luthier": more | {"train": {"max_steps": 1}}})
    done = wait_for(short.id, client)
    assert done.status == "succeeded", done.error
    assert client.models.delete(str(done.fine_tuned_model)).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=str(done.fine_tuned_model), messages=[{"role": "user", "content": "x"}])


def test_keys_and_scopes(service: Service) -> None:
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="sk-wrong", max_retries=0).models.list()
    reader = service.tenant("reader", ("infer",))
    limited = openai.OpenAI(base_url=f"{service.url}/v1", api_key=reader, max_retries=0)
    assert limited.models.list().data
    with pytest.raises(openai.PermissionDeniedError, match="tune"):
        limited.files.list()


def test_the_rate_limit_says_when_to_come_back(service: Service) -> None:
    key = service.tenant("busy", max_requests_per_minute=2)
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)
    for _ in range(2):
        client.models.list()
    with pytest.raises(openai.RateLimitError) as refused:
        [client.models.list() for _ in range(4)]  # the minute may turn in between
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60


def test_batches(client: openai.OpenAI) -> None:
    asks = [{"role": "user", "content": "red"}]
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(
            [{"model": BASE, "messages": asks, "max_tokens": 2}] * 3 + [{"model": "none", "messages": asks}]
        )
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("b.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    deadline = time.monotonic() + 60
    while batch.status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    strictly(Batch, batch)
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
    answers = [json.loads(line) for line in client.files.content(str(batch.output_file_id)).read().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["r0", "r1", "r2"]
    assert answers[0]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert batch.id in [found.id for found in client.batches.list()]
    (failed,) = client.files.content(str(batch.error_file_id)).read().splitlines()
    assert json.loads(failed)["response"]["status_code"] == 404


def test_a_batch_whose_lines_do_not_hold_fails_with_them(client: openai.OpenAI) -> None:
    good = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": BASE, "prompt": "x"}}
    lines = [good, {**good, "url": "/v1/embeddings", "custom_id": "b"}, good, {"custom_id": "c"}]
    content = "\n".join([*map(json.dumps, lines), "{broken"]).encode()
    file = client.files.create(file=("b.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    deadline = time.monotonic() + 60
    while batch.status != "failed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    strictly(Batch, batch)
    assert batch.errors is not None
    assert [problem.line for problem in batch.errors.data or []] == [2, 3, 4, 5]
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        client.batches.cancel(batch.id)
    plain = upload(client)
    with pytest.raises(openai.BadRequestError, match="must be 'batch'"):
        client.batches.create(input_file_id=plain.id, endpoint="/v1/completions", completion_window="24h")


def test_plain_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=BASE, prompt="the red", max_tokens=5, temperature=0, logprobs=2)
    strictly(Completion, whole)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 5
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == 5
    stream = client.completions.create(model=BASE, prompt="the red", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
