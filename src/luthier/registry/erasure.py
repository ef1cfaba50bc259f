"""Erasing a tenant: its records and every byte of its files, for good."""

from __future__ import annotations

from sqlalchemy import delete, select

from luthier.registry.problems import InvalidRequestError, missing
from luthier.store.blobs import Blobs
from luthier.store.database import Database
from luthier.store.tables import (
    Batch,
    BatchLine,
    Checkpoint,
    Delivery,
    Demand,
    Event,
    File,
    Job,
    Key,
    Model,
    Permission,
    RequestCount,
    Tenant,
    Upload,
    UploadPart,
    Usage,
    Webhook,
)


def erase_tenant(database: Database, blobs: Blobs, tenant: str) -> None:
    """Erase a tenant, its keys, files, jobs, models, usage and webhooks.

    Raises:
        InvalidRequestError: while a worker holds one of its jobs: cancel them first.
    """
    with database.writing() as session:
        # Locked against whatever would come to name the tenant while its things are deleted.
        row = session.scalar(select(Tenant).where((Tenant.id == tenant) | (Tenant.name == tenant)).with_for_update())
        if row is None:
            raise missing("tenant", tenant, "tenant")
        now = database.now(session)
        held = session.scalar(
            select(Job.id).where(Job.tenant == row.id, Job.holder.is_not(None), Job.lease_until > now)
        )
        if held is not None:
            raise InvalidRequestError(f"The job {held} is still held by a worker; cancel it, and try again.")
        own = {
            Delivery: Delivery.webhook.in_(select(Webhook.id).where(Webhook.tenant == row.id)),
            Event: Event.job.in_(select(Job.id).where(Job.tenant == row.id)),
            UploadPart: UploadPart.upload.in_(select(Upload.id).where(Upload.tenant == row.id)),
            BatchLine: BatchLine.batch.in_(select(Batch.id).where(Batch.tenant == row.id)),
            Permission: (Permission.tenant == row.id) | (Permission.project == row.id),
        }
        for table, is_own in own.items():
            session.execute(delete(table).where(is_own))
        session.execute(delete(Demand).where(Demand.weights.startswith(f"tenants/{row.id}/")))
        for table in (Webhook, Batch, Upload, Checkpoint, Model, Job, File, Usage, RequestCount, Key):
            session.execute(delete(table).where(table.tenant == row.id))
        session.delete(row)
    blobs.delete(f"tenants/{row.id}")
    database.forget_log()
