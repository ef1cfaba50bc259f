"""One service with a worker for the tests that only add to it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from running import Service, make_context, serving, working
from tiny_models import write_tiny_llama


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    base = write_tiny_llama(folder / "model", max_position_embeddings=512)
    context = make_context(folder, base)
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
