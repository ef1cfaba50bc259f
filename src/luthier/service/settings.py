"""What the environment decides about the service.

LUTHIER_DATABASE_URL    SQLAlchemy's URL (default: SQLite in the data folder)
LUTHIER_STORAGE         where blobs lie: a folder, or s3://bucket/prefix (default: the data folder's `blobs`)
LUTHIER_STORAGE_OPTIONS JSON for fsspec, as in {"endpoint_url": "..."}
LUTHIER_DATA            the data folder (default: ./luthier-data)
LUTHIER_BASES           bases that are served, as in "smollm2-135m-instruct,mine=/models/mine" (default: the catalogue)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError

DEFAULT_DATA = "luthier-data"


@dataclass(frozen=True)
class ServiceSettings:
    """The choices of one installation; API processes and workers share them.

    Attributes:
        data_folder: Where the embedded database and blobs lie, and where workers keep what they can lose.
        database_url, storage, storage_options: Where records and blobs are.
        bases: Name -> what it stands for (a catalogue name, a Hub id, a folder); empty means the whole catalogue.
        step_tokens: Most tokens in one forward of training: it bounds how long a reply waits. The same on all workers,
            since it decides how a job's batches are cut.
        max_file_bytes: Largest file.
        lease_seconds: How long a silent worker keeps its jobs.
        start_seconds: How long a request waits for a worker before it is told to come back.
        private_webhooks: Whether webhooks may go to private addresses.
        blocked_words: Texts that the content filter refuses.
    """

    data_folder: Path = Path(DEFAULT_DATA)
    database_url: str = ""
    storage: str = ""
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    step_tokens: int = 256
    max_file_bytes: int = 512 * 2**20
    lease_seconds: float = 15.0
    start_seconds: float = 60.0
    private_webhooks: bool = False
    blocked_words: tuple[str, ...] = ()

    @property
    def scratch(self) -> Path:
        """Where a process keeps files that it can lose."""
        return self.data_folder / "scratch"


def read_service_settings(data: str | None = None, bases: list[str] | None = None) -> ServiceSettings:
    """Read the environment now; arguments win.

    Raises:
        RecipeError: for a value that does not hold.
    """
    environment = os.environ
    folder = Path(data or environment.get("LUTHIER_DATA", DEFAULT_DATA)).expanduser().absolute()
    named = bases or [part for part in environment.get("LUTHIER_BASES", "").split(",") if part.strip()]
    try:
        options = json.loads(environment.get("LUTHIER_STORAGE_OPTIONS", "{}"))
        numbers = {
            name: kind(environment[f"LUTHIER_{name.upper()}"])
            for name, kind in (("step_tokens", int), ("lease_seconds", float), ("start_seconds", float))
            if f"LUTHIER_{name.upper()}" in environment
        }
    except ValueError as error:
        raise RecipeError(f"a LUTHIER_ variable does not hold: {error}") from None
    return ServiceSettings(
        data_folder=folder,
        database_url=environment.get("LUTHIER_DATABASE_URL") or f"sqlite:///{folder / 'luthier.db'}",
        storage=environment.get("LUTHIER_STORAGE") or str(folder / "blobs"),
        storage_options=options,
        bases=dict(_base(part) for part in named),
        private_webhooks=environment.get("LUTHIER_PRIVATE_WEBHOOKS", "") == "1",
        blocked_words=tuple(w for w in environment.get("LUTHIER_BLOCKED_WORDS", "").split(",") if w.strip()),
        **numbers,  # type: ignore[arg-type]
    )


def _base(text: str) -> tuple[str, str]:
    name, _, source = text.strip().partition("=")
    if not name or any(character in name for character in ":/ "):
        raise RecipeError(
            f"the base {text!r}", "NAME or NAME=SOURCE, the name without ':', '/' and spaces", "look at LUTHIER_BASES"
        )
    return name, source or name
