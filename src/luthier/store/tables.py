"""The tables. One noun a table; times are whole seconds since 1970; public ids are texts, `seq` gives the order.

Ids are random, so lists are ordered by `seq`, which the database hands out. Everything that belongs to a tenant names
it, and is only ever read together with it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, composite, mapped_column

from luthier.store.held_base import HeldBase

_BIG = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER counts by itself there


class Table(DeclarativeBase):
    """The base of every table."""

    type_annotation_map = {int: _BIG, dict[str, Any]: JSON, list[Any]: JSON, float: Float(53)}  # noqa: RUF012


class Tenant(Table):
    """Whoever files, jobs and models belong to. `name` stands in the names of its models."""

    __tablename__ = "tenants"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    weight: Mapped[float] = mapped_column(default=1.0)
    created_at: Mapped[int]
    max_storage_bytes: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    max_trained_tokens_per_day: Mapped[int | None]
    max_requests_per_minute: Mapped[int | None]


class Key(Table):
    """An API key; the key itself is nowhere, only its SHA-256. `prefix` is what lists show of it."""

    __tablename__ = "keys"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(64))
    prefix: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[Any]]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    revoked_at: Mapped[int | None]


class RequestCount(Table):
    """Requests of a tenant in one minute, counted by all API processes together."""

    __tablename__ = "request_counts"
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    minute: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    num_requests: Mapped[int]


class File(Table):
    """A file's record; its bytes lie under `blob`."""

    __tablename__ = "files"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    num_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    blob: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int]
    expires_at: Mapped[int | None]


class Upload(Table):
    """A file that arrives in parts."""

    __tablename__ = "uploads"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    num_bytes: Mapped[int]
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[int]
    expires_at: Mapped[int]
    file: Mapped[str | None] = mapped_column(String(64))
    file_expires_seconds: Mapped[int | None]


class UploadPart(Table):
    """One part of an upload."""

    __tablename__ = "upload_parts"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    upload: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    num_bytes: Mapped[int]
    blob: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int]


class Job(Table):
    """A fine-tuning job: what was asked for, how far it is, and who holds it.

    `holder`, `epoch` and `lease_until` are the lease. `status` is what the owner sees; the holder reads it as a wish.
    `base`, `quantization` and `weights` are what a worker must hold to take it. `pace_step` and `pace_at` are its first
    step since it was taken up last, and `stepped_at` when it did `step`. `need_bytes` is what it takes beyond its base,
    as a worker predicted that had not so much; None until then.
    """

    __tablename__ = "jobs"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    status: Mapped[str] = mapped_column(String(20))
    base: Mapped[str] = mapped_column(String(255))
    quantization: Mapped[str] = mapped_column(String(16), default="", server_default="")
    weights: Mapped[str] = mapped_column(String(255), default="", server_default="")
    held_base: Mapped[HeldBase] = composite("base", "quantization", "weights")
    model: Mapped[str] = mapped_column(String(512))
    tuned_model: Mapped[str] = mapped_column(String(512))
    spec: Mapped[dict[str, Any]]
    hyperparameters: Mapped[dict[str, Any]]
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    labels: Mapped[dict[str, Any]]
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    train_blob: Mapped[str] = mapped_column(Text)
    validation_blob: Mapped[str | None] = mapped_column(Text)
    start_from: Mapped[str | None] = mapped_column(Text)
    parent: Mapped[str | None] = mapped_column(String(512))
    hold_out: Mapped[float] = mapped_column(default=0.0)
    rows_checked: Mapped[bool]
    created_at: Mapped[int]
    started_at: Mapped[int | None]
    finished_at: Mapped[int | None]
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    pace_step: Mapped[int | None]
    pace_at: Mapped[int | None]
    stepped_at: Mapped[int | None]
    num_tokens_per_epoch: Mapped[int | None]
    trained_tokens: Mapped[int] = mapped_column(default=0)
    estimate: Mapped[dict[str, Any]]
    evaluation: Mapped[dict[str, Any] | None]
    result_file: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[dict[str, Any] | None]
    num_losses: Mapped[int] = mapped_column(default=0)
    need_bytes: Mapped[int | None]
    best_step: Mapped[int] = mapped_column(default=0)
    holder: Mapped[str | None] = mapped_column(String(64))
    epoch: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[float | None]
    __table_args__ = (Index("jobs_waiting", "base", "status"), Index("jobs_held", "holder"))


class Event(Table):
    """Something that happened to a job. Rows are added and never changed; `key` keeps a replay from adding twice."""

    __tablename__ = "events"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    key: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]
    __table_args__ = (UniqueConstraint("job", "key"),)


class Checkpoint(Table):
    """A job's checkpoint. `blob` is None once its files are gone and only the record is left."""

    __tablename__ = "checkpoints"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    step: Mapped[int]
    model: Mapped[str] = mapped_column(String(512))
    metrics: Mapped[dict[str, Any]]
    blob: Mapped[str | None] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    num_bytes: Mapped[int]
    created_at: Mapped[int]
    __table_args__ = (UniqueConstraint("job", "step"),)


class Permission(Table):
    """Another tenant's right to use a checkpoint's model."""

    __tablename__ = "permissions"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    model: Mapped[str] = mapped_column(String(512), index=True)
    project: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int]
    __table_args__ = (UniqueConstraint("model", "project"),)


class Model(Table):
    """A tuned model: its files and where they came from.

    `base`, `quantization` and `weights` say over what it was trained; `form` what its files are: an "adapter" of the
    bank, peft's "layers", or a "model" with weights of its own.
    """

    __tablename__ = "models"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(512), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    base: Mapped[str] = mapped_column(String(255))
    quantization: Mapped[str] = mapped_column(String(16), default="", server_default="")
    weights: Mapped[str] = mapped_column(String(255), default="", server_default="")
    held_base: Mapped[HeldBase] = composite("base", "quantization", "weights")
    form: Mapped[str] = mapped_column(String(16), default="adapter", server_default="adapter")
    task: Mapped[str] = mapped_column(String(32))
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int | None]
    blob: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    num_bytes: Mapped[int]
    lineage: Mapped[dict[str, Any]]
    created_at: Mapped[int]


class Usage(Table):
    """Tokens of one step of a job, or of one request: what is billed. The key keeps a replay from billing twice."""

    __tablename__ = "usage"
    source: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    base: Mapped[str] = mapped_column(String(255))
    model: Mapped[str] = mapped_column(String(512))
    num_tokens: Mapped[int]
    price_per_million: Mapped[float]
    day: Mapped[int]
    created_at: Mapped[int]
    __table_args__ = (Index("usage_by_day", "tenant", "day"),)


class Price(Table):
    """Prices a million tokens of a base, in whatever currency the operator counts; base "*" is for all others."""

    __tablename__ = "prices"
    base: Mapped[str] = mapped_column(String(255), primary_key=True)
    trained: Mapped[float]
    prompt: Mapped[float]
    generated: Mapped[float]


class Worker(Table):
    """A live worker process and the base that it holds.

    `free_bytes` is what it can give a job now, and `total_bytes` the most that it ever could; None where it has not
    told. `place` is the supervisor that started it.
    """

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    base: Mapped[str] = mapped_column(String(255), index=True)
    quantization: Mapped[str] = mapped_column(String(16), default="", server_default="")
    weights: Mapped[str] = mapped_column(String(255), default="", server_default="")
    held_base: Mapped[HeldBase] = composite("base", "quantization", "weights")
    address: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[int]
    lease_until: Mapped[float]
    place: Mapped[str | None] = mapped_column(String(64))
    free_bytes: Mapped[int | None]
    total_bytes: Mapped[int | None]


class Place(Table):
    """A supervisor that starts workers of these bases on its machine."""

    __tablename__ = "places"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    bases: Mapped[list[Any]]
    lease_until: Mapped[float]


class RoomThere(Table):
    """What a place found when it looked whether a base fits there; forgotten after `until`."""

    __tablename__ = "rooms"
    place: Mapped[str] = mapped_column(String(64), primary_key=True)
    base: Mapped[str] = mapped_column(String(255), primary_key=True)
    quantization: Mapped[str] = mapped_column(String(16), primary_key=True)
    weights: Mapped[str] = mapped_column(String(255), primary_key=True)
    held_base: Mapped[HeldBase] = composite("base", "quantization", "weights")
    base_bytes: Mapped[int]
    free_bytes: Mapped[int]
    total_bytes: Mapped[int]
    until: Mapped[float]


class Demand(Table):
    """When a base was last asked for by somebody who waits: what a supervisor starts workers by."""

    __tablename__ = "demands"
    base: Mapped[str] = mapped_column(String(255), primary_key=True)
    quantization: Mapped[str] = mapped_column(String(16), primary_key=True, default="")
    weights: Mapped[str] = mapped_column(String(255), primary_key=True, default="")
    held_base: Mapped[HeldBase] = composite("base", "quantization", "weights")
    wanted_at: Mapped[float]


class Batch(Table):
    """Many requests in a file, answered into another."""

    __tablename__ = "batches"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    status: Mapped[str] = mapped_column(String(20), index=True)
    endpoint: Mapped[str] = mapped_column(String(64))
    window: Mapped[str] = mapped_column(String(16))
    input_file: Mapped[str] = mapped_column(String(64))
    output_file: Mapped[str | None] = mapped_column(String(64))
    error_file: Mapped[str | None] = mapped_column(String(64))
    labels: Mapped[dict[str, Any]]
    counts: Mapped[dict[str, Any]]
    problems: Mapped[list[Any]]
    times: Mapped[dict[str, Any]]
    created_at: Mapped[int]
    holder: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[float | None]


class BatchLine(Table):
    """The answer to one line of a batch."""

    __tablename__ = "batch_lines"
    batch: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    is_error: Mapped[bool]
    answer: Mapped[dict[str, Any]]


class Webhook(Table):
    """Where a tenant wants to hear of its jobs' ends."""

    __tablename__ = "webhooks"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(128))
    events: Mapped[list[Any]]
    created_at: Mapped[int]


class Delivery(Table):
    """One event on its way to one webhook."""

    __tablename__ = "deliveries"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    webhook: Mapped[str] = mapped_column(ForeignKey("webhooks.id"), index=True)
    event: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    num_attempts: Mapped[int]
    next_attempt_at: Mapped[float | None]
    delivered_at: Mapped[int | None]
    problem: Mapped[str | None] = mapped_column(Text)
    __table_args__ = (UniqueConstraint("webhook", "event"),)
