"""The OpenAPI document, fuzzed by Schemathesis: no 500, no status that the document lacks.

LUTHIER_TEST_FUZZ sets the number of examples an operation (default 5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from running import Service, make_context, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
NUM_EXAMPLES = int(os.environ.get("LUTHIER_TEST_FUZZ", "5"))
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def fuzzed(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, service_database: Callable[[], str]
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    context = make_context(folder, tiny_llama, service_database(), start_seconds=0.0, private_webhooks=False)
    with serving(context) as running:
        running.tenant("acme", ("admin", "tune", "infer"))
        yield running


@pytest.mark.timeout(600 + 10 * NUM_EXAMPLES)
def test_no_operation_fails(fuzzed: Service) -> None:
    """Every operation, with generated parameters and bodies, valid and not."""
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json", timeout=PATIENCE_SECONDS)
    headers = {"authorization": f"Bearer {fuzzed.keys['acme']}"}
    num_operations = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        num_operations += 1
        for mode in (POSITIVE, NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=NUM_EXAMPLES,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
                derandomize=True,
                database=None,
            )
            def check(case: schemathesis.Case) -> None:
                response = case.call(headers=headers, timeout=PATIENCE_SECONDS)
                if response.status_code != 503:  # nobody works here, so that is an honest answer to chat
                    case.validate_response(response, checks=[not_a_server_error, status_code_conformance])

            # An operation without a parameter cannot be called wrongly.
            with contextlib.suppress(Unsatisfiable) if mode is not POSITIVE else contextlib.nullcontext():
                check()
    assert num_operations > 40


def test_the_document_names_every_route(fuzzed: Service) -> None:
    paths = httpx.get(f"{fuzzed.url}/openapi.json").json()["paths"]
    assert len(paths) > 30
    assert all("422" not in verb["responses"] for verbs in paths.values() for verb in verbs.values())
