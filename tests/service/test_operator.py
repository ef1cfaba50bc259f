"""The operator's verbs with --server: what they say is what the store says, and no store here is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from running import Service
from typer.testing import CliRunner, Result

from luthier.cli.main import app
from luthier.cli.operator import Store

Run = Callable[..., Result]


@pytest.fixture
def run(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    root = ["--server", service.url, "--key", service.keys["operator"]]
    return lambda *arguments: CliRunner().invoke(app, [*root, *arguments])


def test_tenants_and_keys_are_made_listed_and_ended(run: Run, service: Service, tmp_path: Path) -> None:
    tenant = run("tenants", "create", "remote", "--weight", "2", "--running-jobs", "3").stdout.strip()
    row = service.context.tenants.get("remote")
    assert (row.id, row.weight, row.max_running_jobs) == (tenant, 2.0, 3)
    assert f"{tenant}  remote  weight 2" in run("tenants", "list").stdout
    changed = run("tenants", "update", "remote", "--requests-per-minute", "9", "--unlimited", "running-jobs")
    assert changed.stdout.strip() == tenant
    row = service.context.tenants.get("remote")
    assert (row.weight, row.max_running_jobs, row.max_requests_per_minute) == (2.0, None, 9)
    assert "storage-bytes" in str(run("tenants", "update", "remote", "--unlimited", "x").exception)
    key, text = run("keys", "create", "remote", "--scope", "infer", "--days", "1").stdout.split()
    assert service.context.tenants.authenticate(text).tenant == tenant
    rotated, _ = run("keys", "rotate", key).stdout.split()
    assert run("keys", "revoke", rotated).exit_code == 0
    assert run("keys", "list", "remote").stdout.count("revoked") == 2
    assert run("tenants", "erase", "remote", "--yes").exit_code == 0
    assert "remote" not in run("tenants", "list").stdout
    assert list(tmp_path.iterdir()) == [], "nothing is made where the command runs"


def test_usage_is_what_the_store_says(run: Run, service: Service) -> None:
    service.context.tenants.create("spender")
    owner = service.context.tenants.get("spender").id
    service.context.usage.record_request(
        tenant=owner, request="chatcmpl-x", base="tiny", model="tiny", num_prompt_tokens=5, num_tokens=7
    )
    here = Store(service.context).usage("spender", 31)
    assert [(row["prompt_tokens"], row["generated_tokens"]) for row in here] == [(5, 7)]
    said = run("usage", "spender").stdout
    assert f"{owner}  tiny  trained 0  prompt 5  generated 7" in said
    assert len(said.splitlines()) == 1
    assert "no tenant" in str(run("usage", "nobody").exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tenants", "list", "--data", "x"), "two places"),
        (("backup", "copy"), "copies files of the store itself"),
        (("restore", "copy"), "copies files of the store itself"),
    ],
    ids=str,
)
def test_what_cannot_go_over_a_server_says_so(arguments: tuple[str, ...], says: str, run: Run) -> None:
    assert says in str(run(*arguments).exception)
