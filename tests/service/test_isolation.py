"""For every route: another tenant's ids answer exactly as ids that do not exist. Keys show up nowhere."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from running import BASE, Service, chat_rows, wait_for

PLACES = re.compile(r"\{(\w+)(?::path)?\}")


@pytest.fixture(scope="module")
def owned(service: Service) -> dict[str, str]:
    """Things of one tenant: path parameter -> id."""
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys["acme"], max_retries=0)
    file = client.files.create(file=("t.jsonl", chat_rows(20)), purpose="fine-tune")
    own = {"train": {"max_steps": 2, "checkpoint_every": 1}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body={"luthier": own})
    done = wait_for(job.id, client)
    assert done.status == "succeeded", done.error
    lines = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": BASE, "prompt": "x"}}
    batch_file = client.files.create(file=("b.jsonl", json.dumps(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=batch_file.id, endpoint="/v1/completions", completion_window="24h")
    upload = client.uploads.create(bytes=9, filename="x.jsonl", mime_type="a/b", purpose="fine-tune")
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    project = service.context.tenants.get("operator").id
    permission = client.fine_tuning.checkpoints.permissions.create(checkpoint, project_ids=[project]).data[0]
    hook = client.post("/luthier/webhooks", cast_to=httpx.Response, body={"url": "http://127.0.0.1:9/x"}).json()
    return {
        "file_id": file.id,
        "job_id": job.id,
        "batch_id": batch.id,
        "upload_id": upload.id,
        "checkpoint": checkpoint,
        "permission_id": permission.id,
        "model": str(done.fine_tuned_model),
        "webhook": hook["id"],
    }


def _body(method: str, path: str) -> dict[str, Any]:
    if path.endswith("/parts"):
        return {"files": {"data": ("p", b"x")}}
    if method == "POST":
        bodies = {"/complete": {"part_ids": ["part_x"]}, "/permissions": {"project_ids": ["org-x"]}}
        return {"json": next((body for end, body in bodies.items() if path.endswith(end)), {})}
    return {}


def _routes(service: Service) -> Iterator[tuple[str, str]]:
    document = httpx.get(f"{service.url}/openapi.json").json()
    for path, verbs in document["paths"].items():
        if PLACES.search(path) and "/admin/" not in path:
            for method in verbs:
                yield method.upper(), path


def _ask(service: Service, key: str, method: str, path: str, values: dict[str, str]) -> tuple[int, str]:
    url = service.url + PLACES.sub(lambda found: values[found[1]], path)
    response = httpx.request(method, url, headers={"authorization": f"Bearer {key}"}, **_body(method, path))
    text = response.text
    for value in values.values():
        text = text.replace(value, "ID")
    return response.status_code, text


def test_another_tenants_things_answer_as_if_they_were_not_there(service: Service, owned: dict[str, str]) -> None:
    routes = list(_routes(service))
    assert len(routes) >= 20
    none = {name: re.sub(r"[A-Za-z0-9](?=[A-Za-z0-9]{0,7}$)", "0", value) for name, value in owned.items()}
    none["model"] = none["checkpoint"] = "ft:tiny:acme::00000000"
    for method, path in routes:
        theirs = _ask(service, service.keys["other"], method, path, owned)
        nothing = _ask(service, service.keys["other"], method, path, none)
        assert theirs == nothing, f"{method} {path}"
        assert theirs[0] == 404, f"{method} {path}: {theirs}"


def test_ids_in_bodies_and_queries(service: Service, owned: dict[str, str], other: openai.OpenAI) -> None:
    calls: tuple[Any, ...] = (
        lambda: other.fine_tuning.jobs.create(model=BASE, training_file=owned["file_id"]),
        lambda: other.fine_tuning.jobs.create(model=owned["model"], training_file=owned["file_id"]),
        lambda: other.chat.completions.create(model=owned["model"], messages=[{"role": "user", "content": "x"}]),
        lambda: other.completions.create(model=owned["checkpoint"], prompt="x"),
        lambda: other.batches.create(
            input_file_id=owned["file_id"], endpoint="/v1/completions", completion_window="24h"
        ),
        lambda: other.files.list(after=owned["file_id"]),
        lambda: other.fine_tuning.jobs.list(after=owned["job_id"]),
        lambda: other.batches.list(after=owned["batch_id"]),
        lambda: other.post("/luthier/predict", cast_to=httpx.Response, body={"model": owned["model"], "input": "x"}),
    )
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert other.fine_tuning.jobs.list().data == []
    assert owned["model"] not in [model.id for model in other.models.list()]


def test_the_operators_routes_need_the_admin_scope(service: Service) -> None:
    document = httpx.get(f"{service.url}/openapi.json").json()
    routes = [(m.upper(), p) for p, verbs in document["paths"].items() if "/admin/" in p for m in verbs]
    assert len(routes) >= 10
    for method, path in routes:
        url = service.url + PLACES.sub("x", path)
        body = (
            {"json": {"name": "x", "scopes": [], "trained": 0, "prompt": 0, "generated": 0}} if method == "POST" else {}
        )
        body = {"json": {"scopes": ["tune"]}} if path.endswith("/keys") and method == "POST" else body
        response = httpx.request(method, url, headers={"authorization": f"Bearer {service.keys['acme']}"}, **body)
        assert response.status_code in (400, 403), f"{method} {path}: {response.text}"
        anonymous = httpx.request(method, url, **body)
        assert anonymous.status_code in (400, 401), f"{method} {path}"


def test_every_route_needs_a_key(service: Service, owned: dict[str, str]) -> None:
    for method, path in _routes(service):
        status, _ = _ask(service, "sk-none", method, path, owned)
        assert status == 401, f"{method} {path}"


def test_keys_are_in_no_log_and_no_error(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    key = service.keys["acme"]
    with caplog.at_level(logging.DEBUG):
        for path in ("/v1/models", "/v1/files/none", f"/v1/files/{key}", "/nothing"):
            response = httpx.get(service.url + path, headers={"authorization": f"Bearer {key}"})
            if key not in path:
                assert key not in response.text
    ours = [record for record in caplog.records if record.name.startswith(("luthier", "uvicorn", "sqlalchemy"))]
    assert ours
    assert [(r.name, r.getMessage()[:300]) for r in ours if key in str(vars(r))] == []
