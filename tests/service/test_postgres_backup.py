"""Backup and restore over PostgreSQL and S3: the lines of the guide, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import postgres
import pytest
from running import BASE, chat_rows, make_context, serving, wait_for, working

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "service.md"
QUICK: dict[str, Any] = {"train": {"max_steps": 2, "checkpoint_every": 1}, "method": {"type": "lora", "rank": 2}}


def guide_blocks() -> list[str]:
    """The bash blocks of the guide's section on backups: how to copy, and how to restore."""
    text = GUIDE.read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split("\n## Backup\n")[1], flags=re.MULTILINE)[0]
    return re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run(block: str, places: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a block with the places that the guide names put where the test has them."""
    for there, here in places.items():
        assert there in block, f"the guide no longer says {there}"
        block = block.replace(there, here)
    binaries = postgres.find_binaries()
    verb = f'luthier() {{ "{sys.executable}" -m luthier.cli.main "$@"; }}'
    values = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"} | environment
    return subprocess.run(
        ["bash", "-euc", f"{verb}\n{block}"], capture_output=True, text=True, timeout=120, env=values, check=False
    )


def test_the_guides_lines_copy_and_restore(
    postgres_server: postgres.Server, tiny_llama: Path, tmp_path: Path, s3_bucket: tuple[str, dict[str, Any]]
) -> None:
    copy, back = guide_blocks()
    storage, reached_by = s3_bucket
    name = postgres_server.fresh().rpartition("/")[2]
    again = f"{name}again"
    served: dict[str, Any] = {"storage_options": reached_by, "data_folder": tmp_path / "data"}
    context = make_context(tmp_path, tiny_llama, postgres_server.url(name), storage=storage, **served)
    options = {"LUTHIER_STORAGE_OPTIONS": json.dumps(reached_by), "LUTHIER_DATA": str(tmp_path / "data")}
    backups, server = {"/backups": str(tmp_path / "backups")}, f"luthier@127.0.0.1:{postgres_server.port}"
    (tmp_path / "backups").mkdir()
    with serving(context) as service, working(context, tmp_path / "worker"):
        key = service.tenant("acme")
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)
        file = client.files.create(file=("t.jsonl", chat_rows(20)), purpose="fine-tune")
        made = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body={"luthier": QUICK})
        job = wait_for(made.id, client)
        assert job.status == "succeeded"
        here = {"luthier@db/luthier": f"{server}/{name}", "s3://bucket/luthier": storage}
        copied = run(copy, backups | here, **options)
        assert copied.returncode == 0, copied.stderr
        after = client.files.create(file=("later.jsonl", chat_rows(11)), purpose="fine-tune")

    there = {"luthier@db/": f"{server}/", " again\n": f" {again}\n", "/again ": f"/{again} "}
    there["s3://bucket/again"] = f"{storage}-again"
    restored = run(back, backups | there, **options)
    assert restored.returncode == 0, restored.stderr
    assert "the database names no other" in restored.stdout
    second = make_context(tmp_path, tiny_llama, postgres_server.url(again), storage=f"{storage}-again", **served)
    with serving(second) as service, working(second, tmp_path / "worker"):
        assert httpx.get(f"{service.url}/readyz").status_code == 200
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)
        assert client.files.content(file.id).read() == chat_rows(20)
        assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == job.fine_tuned_model
        assert len(client.fine_tuning.jobs.list_events(job.id, limit=50).data) > 5
        reply = client.chat.completions.create(
            model=str(job.fine_tuned_model), messages=[{"role": "user", "content": "red"}], max_tokens=3
        )
        assert reply.choices[0].finish_reason
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(after.id)
        # The numbers that order lists go on from where they were.
        newer = client.files.create(file=("new.jsonl", chat_rows(12)), purpose="fine-tune")
        assert [row.id for row in client.files.list()] == [newer.id, *job.result_files, file.id]


def test_a_restore_without_all_blobs_names_one(
    postgres_server: postgres.Server, tiny_llama: Path, tmp_path: Path
) -> None:
    url = postgres_server.fresh()
    context = make_context(tmp_path / "data", tiny_llama, url)
    with serving(context) as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.tenant("acme"), max_retries=0)
        client.files.create(file=("a.jsonl", chat_rows(10)), purpose="fine-tune")
    environment = {"LUTHIER_DATABASE_URL": url, "LUTHIER_DATA": str(tmp_path / "data")}
    assert run(f"luthier backup {tmp_path}/copy --blobs-only", {}, **environment).returncode == 0
    again = run(f"luthier backup {tmp_path}/copy --blobs-only", {}, **environment)
    assert (again.returncode, "is not empty" in again.stderr) == (2, True)
    whole = run(f"luthier backup {tmp_path}/whole", {}, **environment)
    assert (whole.returncode, "--blobs-only" in whole.stderr) == (2, True)
    (blob,) = (path for path in (tmp_path / "copy").rglob("*") if path.is_file())
    blob.rename(blob.with_name("another"))
    environment["LUTHIER_STORAGE"] = str(tmp_path / "elsewhere")
    lacking = run(f"luthier restore {tmp_path}/copy --blobs-only", {}, **environment)
    assert lacking.returncode == 2
    assert "lacks 1 blobs" in lacking.stderr
    empty = run(f"luthier restore {tmp_path} --blobs-only", {}, **environment)
    assert "holds no blobs" in empty.stderr
