"""Keys, scopes, quotas and usage."""

from __future__ import annotations

import io
from typing import Any

import pytest
from records import Record
from sqlalchemy import select

from luthier.registry.problems import InvalidKeyError, InvalidRequestError, MissingError, QuotaError
from luthier.store.tables import Key


def test_a_key_is_known_only_by_its_digest(record: Record) -> None:
    tenant = record.tenants.create("a")
    row, text = record.tenants.create_key("a", ["tune", "infer"])
    caller = record.tenants.authenticate(text)
    assert (caller.tenant, caller.scopes) == (tenant.id, {"tune", "infer"})
    with record.database.reading() as session:
        stored = session.scalars(select(Key)).one()
    secret = text.split("-", 2)[2]  # which may hold dashes itself
    assert all(secret not in str(value) for value in vars(stored).values())
    for wrong in (
        text[:-1] + ("a" if text[-1] != "a" else "b"),
        text + "x",
        "",
        "sk-" + "a" * 12 + "-" + "b" * 40,
        "é",
    ):
        with pytest.raises(InvalidKeyError, match="Incorrect"):
            record.tenants.authenticate(wrong)
    record.tenants.revoke(row.id)
    with pytest.raises(InvalidKeyError, match="Incorrect"):
        record.tenants.authenticate(text)


def test_keys_rotate_and_expire(record: Record) -> None:
    record.tenants.create("a")
    old, old_text = record.tenants.create_key("a", ["infer"])
    _, new_text = record.tenants.rotate(old.id, overlap_seconds=100)
    assert record.tenants.authenticate(old_text).scopes == record.tenants.authenticate(new_text).scopes
    newest, newest_text = record.tenants.rotate(record.tenants.authenticate(new_text).key)
    with pytest.raises(InvalidKeyError):
        record.tenants.authenticate(new_text)
    with record.database.writing() as session:
        session.scalars(select(Key).where(Key.id == newest.id)).one().expires_at = 1
    with pytest.raises(InvalidKeyError):
        record.tenants.authenticate(newest_text)


def test_a_rotated_key_ends_as_the_old_one_would_have(record: Record) -> None:
    record.tenants.create("a")
    lasting, _ = record.tenants.create_key("a", ["infer"])
    ending, _ = record.tenants.create_key("a", ["infer"], expires_in_seconds=1000)
    assert record.tenants.rotate(lasting.id)[0].expires_at is None
    new, _ = record.tenants.rotate(ending.id, overlap_seconds=10)
    assert new.expires_at == new.created_at + 1000


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "../a", "a" * 33, "-a"])
def test_a_tenants_name_goes_into_model_names(record: Record, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="name"):
        record.tenants.create(name)


def test_requests_a_minute_are_counted(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.registry.tenants.now_seconds", lambda: 60_017)  # no minute turns in between
    caller = record.caller("a", max_requests_per_minute=3)
    for _ in range(3):
        record.tenants.count_request(caller.tenant)
    with pytest.raises(QuotaError) as refused:
        record.tenants.count_request(caller.tenant)
    assert refused.value.retry_after_seconds == 43


def test_storage_has_a_limit_and_a_refused_file_leaves_nothing(record: Record) -> None:
    caller = record.caller("a", max_storage_bytes=10)
    kept = record.files.create(caller.tenant, "a.jsonl", "fine-tune", io.BytesIO(b"12345678"))
    with pytest.raises(QuotaError, match="storage quota"):
        record.files.create(caller.tenant, "b.jsonl", "fine-tune", io.BytesIO(b"12345678"))
    assert record.blobs.names(f"tenants/{caller.tenant}/files") == [kept.id]
    with pytest.raises(QuotaError):
        record.files.begin_upload(caller.tenant, "c.jsonl", "fine-tune", 8)


def test_another_tenants_things_do_not_exist(record: Record) -> None:
    mine, other = record.caller("a"), record.caller("b")
    file = record.files.create(mine.tenant, "a.jsonl", "fine-tune", io.BytesIO(b"x"))
    job = record.job(mine)
    for verb in (
        lambda: record.files.get(other.tenant, file.id),
        lambda: record.files.delete(other.tenant, file.id),
        lambda: record.files.page(other.tenant, after=file.id),
        lambda: record.jobs.get(other.tenant, job.id),
        lambda: record.jobs.cancel(other.tenant, job.id),
        lambda: record.jobs.events(other.tenant, job.id),
        lambda: record.jobs.page(other.tenant, after=job.id),
    ):
        with pytest.raises(MissingError, match="No such"):
            verb()


def test_uploads_in_parts(record: Record) -> None:
    tenant = record.caller("a").tenant
    upload = record.files.begin_upload(tenant, "t.jsonl", "fine-tune", 6)
    second = record.files.add_part(tenant, upload.id, io.BytesIO(b"def"))
    first = record.files.add_part(tenant, upload.id, io.BytesIO(b"abc"))
    with pytest.raises(InvalidRequestError, match="announced"):
        record.files.complete_upload(tenant, upload.id, [first.id])
    with pytest.raises(InvalidRequestError, match="checksum"):
        record.files.complete_upload(tenant, upload.id, [first.id, second.id], md5="0" * 32)
    done, file = record.files.complete_upload(tenant, upload.id, [first.id, second.id])
    assert done.status == "completed"
    assert b"".join(record.files.pieces(file)) == b"abcdef"
    assert record.blobs.names(f"tenants/{tenant}/uploads/{upload.id}") == []
    with pytest.raises(InvalidRequestError, match="completed already"):
        record.files.add_part(tenant, upload.id, io.BytesIO(b"x"))


def test_usage_adds_up_by_day_and_model(record: Record) -> None:
    caller = record.caller("a")
    record.usage.set_price("*", 0.0, 1.0, 3.0)
    bill: dict[str, Any] = {"tenant": caller.tenant, "base": "tiny", "model": "m"}
    for _ in range(2):
        record.usage.record_request(**bill, request="r1", num_prompt_tokens=10, num_tokens=5)
    (row,) = record.usage.by_day(caller.tenant)
    assert (row["prompt_tokens"], row["generated_tokens"], row["trained_tokens"]) == (10, 5, 0)
    assert row["cost"] == pytest.approx(25e-6)
    assert record.usage.by_day(record.caller("b").tenant) == []
    for line in (0, 1, 1):  # a batch's line that two runners answered is billed once
        record.usage.record_request(**bill, request="batch_1", line=line, num_prompt_tokens=1, num_tokens=0)
    assert record.usage.by_day(caller.tenant)[0]["prompt_tokens"] == 12
