"""For every route: another tenant's ids answer exactly as ids that do not exist. Keys show up nowhere."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from running import BASE, Service, chat_rows, wait_for

from luthier.service import routes

ID_PATTERN = "^[A-Za-z0-9_-]+$"
"""What bodies say of an id."""
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
    part = client.uploads.parts.create(upload.id, data=b"x")
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    project = service.context.tenants.get("operator").id
    permission = client.fine_tuning.checkpoints.permissions.create(checkpoint, project_ids=[project]).data[0]
    hook = client.post("/luthier/webhooks", cast_to=httpx.Response, body={"url": "http://127.0.0.1:9/x"}).json()
    return {
        "file_id": file.id,
        "job_id": job.id,
        "batch_id": batch.id,
        "upload_id": upload.id,
        "part_id": part.id,
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


def _operations(service: Service) -> Iterator[tuple[str, str]]:
    document = httpx.get(f"{service.url}/openapi.json").json()
    for path, verbs in document["paths"].items():
        for method in verbs:
            yield method.upper(), path


def _routes(service: Service) -> Iterator[tuple[str, str]]:
    for method, path in _operations(service):
        if PLACES.search(path) and "/admin/" not in path:
            yield method, path


def _ask(service: Service, key: str, method: str, path: str, values: dict[str, str]) -> tuple[int, str]:
    url = service.url + PLACES.sub(lambda found: values[found[1]], path)
    response = httpx.request(method, url, headers={"authorization": f"Bearer {key}"}, **_body(method, path))
    text = response.text
    for value in values.values():
        text = text.replace(value, "ID")
    return response.status_code, text


def test_another_tenants_things_answer_as_if_they_were_not_there(service: Service, owned: dict[str, str]) -> None:
    known = list(_routes(service))
    assert len(known) >= 20
    none = {name: re.sub(r"[A-Za-z0-9](?=[A-Za-z0-9]{0,7}$)", "0", value) for name, value in owned.items()}
    none["model"] = none["checkpoint"] = "ft:tiny:acme::00000000"
    for method, path in known:
        theirs = _ask(service, service.keys["other"], method, path, owned)
        nothing = _ask(service, service.keys["other"], method, path, none)
        assert theirs == nothing, f"{method} {path}"
        assert theirs[0] == 404, f"{method} {path}: {theirs}"


def test_ids_in_bodies_and_queries(service: Service, owned: dict[str, str], other: openai.OpenAI) -> None:
    mine = other.files.create(file=("t.jsonl", chat_rows(12)), purpose="fine-tune").id
    calls: tuple[Any, ...] = (
        lambda: other.fine_tuning.jobs.create(model=BASE, training_file=owned["file_id"]),
        lambda: other.fine_tuning.jobs.create(model=BASE, training_file=mine, validation_file=owned["file_id"]),
        lambda: other.fine_tuning.jobs.create(model=owned["model"], training_file=mine),
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
    upload = other.uploads.create(bytes=1, filename="x.jsonl", mime_type="a/b", purpose="fine-tune")
    theirs, nothing = (
        httpx.post(
            f"{service.url}/v1/uploads/{upload.id}/complete",
            headers={"authorization": f"Bearer {service.keys['other']}"},
            json={"part_ids": [part]},
        ).text.replace(part, "ID")
        for part in (owned["part_id"], "part_none")
    )
    assert theirs == nothing
    assert owned["model"] not in [model.id for model in other.models.list()]


def test_the_operators_routes_need_the_admin_scope(service: Service) -> None:
    document = httpx.get(f"{service.url}/openapi.json").json()
    known = [(m.upper(), p) for p, verbs in document["paths"].items() if "/admin/" in p for m in verbs]
    assert len(known) >= 10
    for method, path in known:
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
    plain = [(verb, path) for verb, path in _operations(service) if not PLACES.search(path)]
    assert len(plain) > 12
    for method, path in plain:
        status, text = _ask(service, "sk-none", method, path, {})
        # Bodies are looked at first, and theirs are empty here.
        is_open = path in ("/healthz", "/readyz", "/metrics")
        assert status == 200 if is_open else status in (400, 401), f"{method} {path}: {text}"
        assert status != 400 or method == "POST"


def test_no_route_is_left_out(service: Service) -> None:
    """What the tests here know is the document; it names every route that the modules of routes define."""
    defined = {
        (method, route.path.replace(":path}", "}"))
        for module in pkgutil.iter_modules(routes.__path__)
        for route in getattr(importlib.import_module(f"{routes.__name__}.{module.name}"), "router", APIRouter()).routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert defined == {(method, path.replace(":path}", "}")) for method, path in _operations(service)}


NAMING = {
    "JobCreate": {"model", "training_file", "validation_file"},
    "BatchCreate": {"input_file_id"},
    "UploadComplete": {"part_ids"},
    "PermissionCreate": {"project_ids"},
    "ChatCreate": {"model"},
    "CompletionCreate": {"model"},
    "PredictCreate": {"model"},
}
"""Fields of bodies that name things. `test_ids_in_bodies_and_queries` has them; a new one fails here until it does."""


def test_every_field_that_names_a_thing_is_known_here(service: Service) -> None:
    document = httpx.get(f"{service.url}/openapi.json").json()
    found = {
        name: {
            field
            for field, schema in kind.get("properties", {}).items()
            if field == "model" or re.search(r"_ids?$|_file$", field) or ID_PATTERN in json.dumps(schema)
        }
        for name, kind in document["components"]["schemas"].items()
    }
    assert {name: fields - {"prompt_cache_key"} for name, fields in found.items() if fields} == NAMING
    queries = {
        parameter["name"]
        for verbs in document["paths"].values()
        for verb in verbs.values()
        for parameter in verb.get("parameters", [])
        if parameter["in"] == "query"
    }
    assert queries == {"after", "limit", "order", "purpose", "project_id", "days"}


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
