"""What every route works with: the verbs over one store, and the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.registry.batches import Batches
from luthier.registry.files import Files
from luthier.registry.jobs import Jobs
from luthier.registry.models import Models
from luthier.registry.tenants import Tenants
from luthier.registry.usage import UsageBook
from luthier.registry.webhooks import Webhooks
from luthier.service.bases import Bases
from luthier.service.content_filter import ContentFilter, WordFilter
from luthier.service.dispatch import Dispatcher
from luthier.service.measures import Measures
from luthier.service.settings import ServiceSettings
from luthier.store.blobs import Blobs
from luthier.store.database import Database


@dataclass
class Context:
    """One process's view of the record. Safe to share between threads."""

    settings: ServiceSettings
    database: Database
    blobs: Blobs
    bases: Bases
    content_filter: ContentFilter = field(init=False)
    measures: Measures = field(default_factory=Measures)

    def __post_init__(self) -> None:
        self.tenants = Tenants(self.database)
        self.files = Files(self.database, self.blobs, self.settings.max_file_bytes)
        self.jobs = Jobs(self.database)
        self.models = Models(self.database, self.blobs)
        self.usage = UsageBook(self.database)
        self.batches = Batches(self.database)
        self.webhooks = Webhooks(self.database, self.settings.private_webhooks)
        self.dispatcher = Dispatcher(self.database, self.settings.start_seconds)
        self.content_filter = WordFilter(self.settings.blocked_words)
