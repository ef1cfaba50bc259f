"""The bases of an installation, by the names that tenants use. Importing this module does not import torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from luthier.base.catalogue import CATALOGUE, CatalogueEntry, find
from luthier.base.fetch import cached_folder
from luthier.data.template import Renderer
from luthier.errors import LuthierError
from luthier.service.bases import BaseFacts

PUBLISHED_AT = 1_730_000_000
"""A fixed date for lists: when a base was published is not known here."""


class ServedBases:
    """`luthier.service.bases.Bases` over the catalogue, or over the bases that the operator named.

    Args:
        named: Name -> catalogue name, Hub id or folder. Empty: the whole catalogue.
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self._sources = dict(named) or {entry.name: entry.name for entry in CATALOGUE}
        self._renderers: dict[str, Renderer] = {}
        self._lock = threading.Lock()

    def all(self) -> list[BaseFacts]:
        return [_facts(name, find(source)) for name, source in self._sources.items()]

    def find(self, name: str) -> BaseFacts | None:
        source = self._sources.get(name)
        return None if source is None else _facts(name, find(source))

    def source(self, name: str) -> str:
        """What the base's name stands for."""
        return self._sources[name]

    def renderer(self, name: str) -> Renderer | None:
        with self._lock:
            if name not in self._renderers:
                folder = self._folder(name)
                if folder is None:
                    return None
                try:
                    self._renderers[name] = Renderer.load(folder)
                except LuthierError:
                    return None  # the worker tells what is wrong with the base, in the job's error
            return self._renderers[name]

    def _folder(self, name: str) -> Path | None:
        source = self._sources[name]
        if Path(source).is_dir():
            return Path(source)
        return cached_folder(source)


def _facts(name: str, entry: CatalogueEntry | None) -> BaseFacts:
    if entry is None:
        return BaseFacts(name, "operator", PUBLISHED_AT, "a base of this installation")
    return BaseFacts(name, entry.hub_id.partition("/")[0], PUBLISHED_AT, entry.description)
