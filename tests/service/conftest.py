"""One service with a worker for the tests that only add to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from running import Service, make_context, serving, working


@pytest.fixture(scope="session")
def service(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    context = make_context(folder, tiny_llama)
    with serving(context) as running, working(context, folder / "worker"):
        running.tenant("acme")
        running.tenant("other")
        running.tenant("operator", ("admin", "tune", "infer"))
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys["acme"], max_retries=0) as client:
        yield client


@pytest.fixture
def other(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys["other"], max_retries=0) as client:
        yield client
