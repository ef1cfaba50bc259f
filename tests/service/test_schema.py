"""The OpenAPI document, fuzzed by Schemathesis: no 500, no status that the document lacks.

One round asks every operation; LUTHIER_TEST_FUZZ sets for how many seconds further rounds, each with other examples,
follow it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from running import Service, make_context, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
FUZZ_SECONDS = float(os.environ.get("LUTHIER_TEST_FUZZ", "0"))
NUM_EXAMPLES = 5  # an operation and round, valid and not
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


@pytest.mark.timeout(600 + 2 * FUZZ_SECONDS)
def test_no_operation_fails(fuzzed: Service) -> None:
    """Every operation, with generated parameters and bodies, valid and not."""
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json", timeout=PATIENCE_SECONDS)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 40
    end = time.monotonic() + FUZZ_SECONDS
    num_rounds = 0
    while num_rounds == 0 or time.monotonic() < end:
        for operation in operations:
            ask(operation, POSITIVE, fuzzed, num_rounds)
            # An operation without a parameter cannot be called wrongly.
            with contextlib.suppress(Unsatisfiable):
                ask(operation, NEGATIVE, fuzzed, num_rounds)
        num_rounds += 1
    print(f"{num_rounds} rounds of {len(operations)} operations")


def ask(operation: Any, mode: schemathesis.GenerationMode, service: Service, number: int) -> None:
    """Call one operation with generated examples, which the number of the round settles."""
    headers = {"authorization": f"Bearer {service.keys['acme']}"}

    @seed(number)
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        database=None,
    )
    def check(case: schemathesis.Case) -> None:
        response = case.call(headers=headers, timeout=PATIENCE_SECONDS)
        if response.status_code != 503:  # nobody works here, so that is an honest answer to chat
            case.validate_response(response, checks=[not_a_server_error, status_code_conformance])

    check()


def test_the_document_names_every_route(fuzzed: Service) -> None:
    paths = httpx.get(f"{fuzzed.url}/openapi.json").json()["paths"]
    assert len(paths) > 30
    assert all("422" not in verb["responses"] for verbs in paths.values() for verb in verbs.values())
