"""Verbs that meet on the same rows: none waits for another that waits for it, and none fails for having come second."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from records import Record

from luthier.registry.seam import Claim, JobResult, StepRecord, WorkerCard
from luthier.registry.tenants import Caller
from luthier.store.held_base import HeldBase
from luthier.store.tables import File

LEASE = 30.0
NUM_AT_ONCE = 8


def at_once(work: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return list(pool.map(work, numbers))


def file(record: Record, caller: Caller) -> File:
    return record.files.create(caller.tenant, "t.jsonl", "fine-tune", io.BytesIO(b"{}\n"))


def test_jobs_over_the_same_files_and_a_base_that_nobody_asked_for_before(record: Record) -> None:
    caller = record.caller("a")
    left, right = file(record, caller), file(record, caller)

    def create(number: int) -> None:
        files = (left, right) if number % 2 else (right, left)
        record.job(caller, f"base{number // 4}", training_file=files[0], validation_file=files[1])

    at_once(create, range(40))
    assert record.jobs.queue_length() == {"queued": 40}
    assert len(record.work.wanted_bases()) == 10


def test_a_checkpoint_is_permitted_once(record: Record) -> None:
    caller, guest = record.caller("a"), record.caller("b")
    job = record.job(caller)
    record.work.register(WorkerCard("w", HeldBase("tiny"), "http://127.0.0.1:1", "s"), LEASE)
    (claimed,) = record.work.claim("w", 1, LEASE)
    finish(record, claimed.claim)
    at_once(lambda _: record.jobs.permit(caller.tenant, job.tuned_model, [guest.tenant]), range(NUM_AT_ONCE))
    page = record.jobs.permissions(caller.tenant, job.tuned_model, None, None, 20, "descending")
    assert [row.project for row in page.items] == [guest.tenant]


@pytest.mark.parametrize("quota", [None, 10**9])
def test_a_workers_verbs_its_heartbeat_and_its_leaving(record: Record, quota: int | None) -> None:
    """Steps, beats, owners' wishes and requests that are counted, all about one tenant's jobs; then the worker goes."""
    caller = record.caller("a", max_requests_per_minute=10_000, max_trained_tokens_per_day=quota)
    jobs = [record.job(caller) for _ in range(6)]
    record.webhooks.create(caller.tenant, "http://127.0.0.1:9/", None)
    for name in ("w1", "w2"):
        record.work.register(WorkerCard(name, HeldBase("tiny"), "http://127.0.0.1:1", "s"), LEASE)
    claims = [job.claim for name in ("w1", "w2") for job in record.work.claim(name, 3, LEASE)]
    for claim in claims:
        record.work.begin(claim, 100, 5, 500)

    def act(number: int) -> None:
        claim = claims[number % len(claims)]
        match number % 5:
            case 0 | 1:
                record.work.record_steps(claim, [StepRecord(number, 1000, 1.0, 10, 1e-3)])
            case 2:
                record.work.heartbeat(claim.worker, LEASE)
            case 3:
                record.tenants.count_request(caller.tenant)
            case 4:
                file(record, caller)

    at_once(act, range(1, 161))

    def end(number: int) -> None:
        match number % 3:
            case 0:
                record.jobs.cancel(caller.tenant, jobs[number].id)
            case 1:
                record.work.heartbeat("w1", LEASE)
                record.webhooks.take_due()
            case 2:
                record.work.leave("w1" if number == 2 else "w2")

    at_once(end, range(6))
    statuses = [record.jobs.get(caller.tenant, job.id).status for job in jobs]
    assert sorted(statuses) == ["cancelled"] * 2 + ["queued"] * 4
    assert record.jobs.costs(jobs).keys() == {job.id for job in jobs}


def finish(record: Record, claim: Claim) -> None:
    record.work.begin(claim, 10, 5, 500)
    record.work.finish(claim, JobResult("m/1", "x", 1, {}, {}, 2))
