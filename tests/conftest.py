"""Fixtures shared by all tests: tiny models as folders, and the real default base."""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import postgres
import pytest
from tiny_models import write_tiny_llama, write_tiny_phi3, write_tiny_qwen3

# bitsandbytes, which tests compare with, asks at import for functions to be compiled; peft imports it wherever it is,
# and every process that a test starts would load torch's compiler for it.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def pytest_configure() -> None:
    """Collect no garbage while the tests are imported: what they import stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and what was imported is not walked for it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test takes the power away, and what a killed process wrote is with the system: nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder, output layer untied. Read only: it is shared by the whole session."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_llama_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder whose output layer is its embedding. Read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama-tied", tied=True)


@pytest.fixture(scope="session")
def tiny_llama_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder whose tokenizer prepends BOS. Read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama-bos", add_bos=True)


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-3's folder with LongRoPE (32 of 128 positions) and a sliding window of 24. Read only."""
    return write_tiny_phi3(tmp_path_factory.mktemp("models") / "tiny-phi3")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3's folder whose template drops earlier reasoning; embeddings tied. Read only."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="module")
def no_reports() -> Iterator[None]:
    """Runs leave no report.html, for modules that look at none: its charts take a third of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.evaluate.report.write_report", lambda run: run / "report.html")
        yield


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The folder of the catalogue's default model; use it only in tests marked `real`."""
    from luthier.base.fetch import resolve

    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    """A PostgreSQL for the session; what needs it is skipped where it is not installed."""
    binaries = postgres.find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres.running(binaries) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'luthier.db'}"
    server: postgres.Server = request.getfixturevalue("postgres_server")
    return server.fresh()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 of the session's own, on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """A new bucket: its URL, and the options by which it is reached."""
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{secrets.token_hex(6)}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/data", {"endpoint_url": s3_endpoint}
