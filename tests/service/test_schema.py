"""The OpenAPI document, fuzzed by Schemathesis: no 500, no status that the document lacks.

LUTHIER_TEST_FUZZ sets the number of examples an operation (default 5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from running import Service, make_context, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

NUM_EXAMPLES = int(os.environ.get("LUTHIER_TEST_FUZZ", "5"))


@pytest.fixture(scope="module")
def fuzzed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    context = make_context(tmp_path_factory.mktemp("fuzz"), tiny_llama, start_seconds=0.0, private_webhooks=False)
    with serving(context) as running:
        running.tenant("acme", ("admin", "tune", "infer"))
        yield running


@pytest.fixture(scope="module")
def document(fuzzed: Service) -> object:
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,
)
def test_no_operation_fails(case: schemathesis.Case, fuzzed: Service) -> None:
    response = case.call(headers={"authorization": f"Bearer {fuzzed.keys['acme']}"})
    if response.status_code == 503:
        assert b"defect" not in response.content  # nobody works here, so 503 is an honest answer to chat
        return
    case.validate_response(response, checks=[not_a_server_error, status_code_conformance])


def test_the_document_names_every_route(fuzzed: Service) -> None:
    paths = httpx.get(f"{fuzzed.url}/openapi.json").json()["paths"]
    assert len(paths) > 30
    assert all("422" not in verb["responses"] for verbs in paths.values() for verb in verbs.values())
