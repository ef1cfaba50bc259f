"""One service with a worker for the tests that only add to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import openai
import postgres
import pytest
from running import Service, make_context, serving, working
from tiny_models import write_tiny_llama


@pytest.fixture(scope="session")
def service_database(request: pytest.FixtureRequest) -> Callable[[], str]:
    """URLs of new databases of the kind in LUTHIER_TEST_DATABASE; empty for SQLite, the default."""
    if os.environ.get("LUTHIER_TEST_DATABASE", "sqlite") != "postgresql":
        return lambda: ""
    server: postgres.Server = request.getfixturevalue("postgres_server")
    return server.fresh


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, service_database: Callable[[], str]) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    base = write_tiny_llama(folder / "model", max_position_embeddings=512)
    context = make_context(folder, base, service_database())
    with serving(context) as running, working(context, folder / "worker") as running.worker:
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
