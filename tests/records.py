"""The record's verbs over one store, and helpers that make things."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from luthier.registry.files import Files
from luthier.registry.jobs import Jobs, NewJob
from luthier.registry.models import Models
from luthier.registry.tenants import Caller, Tenants
from luthier.registry.usage import UsageBook
from luthier.registry.webhooks import Webhooks
from luthier.registry.work import StoredWork
from luthier.store.blobs import Blobs
from luthier.store.database import Database
from luthier.store.held_base import HeldBase
from luthier.store.tables import Job


@dataclass
class Record:
    """The verbs over one store, and helpers that make things."""

    database: Database
    blobs: Blobs

    def __post_init__(self) -> None:
        self.tenants = Tenants(self.database)
        self.files = Files(self.database, self.blobs, max_file_bytes=1 << 20)
        self.jobs = Jobs(self.database)
        self.models = Models(self.database, self.blobs)
        self.usage = UsageBook(self.database)
        self.webhooks = Webhooks(self.database, may_be_private=True)
        self.work = StoredWork(self.database, self.blobs)

    def caller(self, name: str, weight: float = 1.0, **quotas: int | None) -> Caller:
        tenant = self.tenants.create(name, weight, **quotas)
        return Caller(tenant.id, name, "key_none", frozenset({"tune", "infer"}))

    def job(self, caller: Caller, base: str = "tiny", **values: Any) -> Job:
        file = self.files.create(caller.tenant, "train.jsonl", "fine-tune", io.BytesIO(b"{}\n"))
        given: dict[str, Any] = {
            "base": HeldBase(base),
            "model": base,
            "spec": {"task": {"type": "chat"}, "method": {"type": "lora"}},
            "hyperparameters": {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0},
            "training_file": file,
            "validation_file": None,
            "hold_out": 0.0,
            "suffix": None,
            "seed": 1,
            "labels": {},
            "parent": None,
            "start_from": None,
            "rows_checked": True,
            "estimate": {},
        }
        return self.jobs.create(caller, NewJob(**(given | values)))
