"""Adapters that serve: immutable slots, loaded when they are asked for, and let go when others need the room.

An adapter is named by the key prefix of its files, which are written once and never change, so that name is its
content. A job that saves a checkpoint hands its snapshot over in memory under the prefix of that checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

from luthier.base.load import Base
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.data.template import Renderer
from luthier.engine.slot import Slot
from luthier.store.blobs import Blobs


def tenant_of(prefix: str) -> str:
    """Whose files a key prefix is of: "tenants/{id}/..."."""
    return prefix.split("/")[1]


class AdapterFolders:
    """Local copies of adapters' files. Safe to use from several threads.

    Args:
        folder: Where they lie; it can be lost.
    """

    def __init__(self, blobs: Blobs, folder: Path, max_folders: int = 256) -> None:
        self._blobs = blobs
        self._folder = folder
        self._max = max_folders
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Path] = OrderedDict()
        self._fetching: dict[str, threading.Lock] = {}
        self._renderers: dict[str, Renderer] = {}
        shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, prefix: str) -> tuple[Path, Renderer | None]:
        """The adapter's folder, and its own tokenizer where it has one.

        Raises:
            StorageError: when its files are gone.
        """
        with self._lock:
            own_lock = self._fetching.setdefault(prefix, threading.Lock())
        with own_lock:  # one download of an adapter at a time, and no other waits for it
            with self._lock:
                is_known = prefix in self._known
            if not is_known:
                self._download(prefix)
            with self._lock:
                self._fetching.pop(prefix, None)
                self._known.move_to_end(prefix)
                return self._known[prefix], self._renderers.get(prefix)

    @property
    def tenants(self) -> set[str]:
        """Whose adapters lie here."""
        with self._lock:
            return {tenant_of(prefix) for prefix in self._known}

    def forget(self, tenant: str) -> None:
        """Remove a tenant's adapters from here."""
        with self._lock:
            for prefix in [prefix for prefix in self._known if tenant_of(prefix) == tenant]:
                self._renderers.pop(prefix, None)
                shutil.rmtree(self._known.pop(prefix), ignore_errors=True)

    def _download(self, prefix: str) -> None:
        target = self._folder / hashlib.sha256(prefix.encode()).hexdigest()[:24]
        target.parent.mkdir(parents=True, exist_ok=True)
        self._blobs.get_folder(prefix, target)
        own = Renderer.load(target) if (target / "tokenizer.json").exists() else None
        with self._lock:
            self._known[prefix] = target
            if own is not None:
                self._renderers[prefix] = own
            while len(self._known) > self._max:
                old, path = self._known.popitem(last=False)
                self._renderers.pop(old, None)
                shutil.rmtree(path, ignore_errors=True)


class ServedSlots:
    """Slots that serve, the last used kept. For the thread that runs the base.

    Args:
        max_slots: Most of them in memory; one that is answering is never let go.
    """

    def __init__(self, base: Base, max_slots: int) -> None:
        self._base = base
        self._max = max_slots
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._num_users: dict[str, int] = {}

    def adopt(self, prefix: str, slot: Slot) -> None:
        """Let a job's slot serve as it is now, under this prefix."""
        if prefix not in self._slots:
            self._slots[prefix] = self._base.bank.snapshot(slot)
            self._evict()

    def borrow(self, prefix: str, folder: Path) -> Slot:
        """The adapter's slot, loaded if need be; give it back with `give_back`."""
        if prefix not in self._slots:
            slot = slot_from_adapter(self._base, folder, dropout=0.0)
            for parameter in slot.parameters().values():
                parameter.requires_grad_(False)
            slot.is_snapshot = True
            self._slots[prefix] = slot
        self._slots.move_to_end(prefix)
        self._num_users[prefix] = self._num_users.get(prefix, 0) + 1
        self._evict()
        return self._slots[prefix]

    def give_back(self, prefix: str) -> None:
        """A reply of this adapter is over."""
        self._num_users[prefix] -= 1
        if not self._num_users[prefix]:
            del self._num_users[prefix]
        self._evict()

    def forget(self, tenant: str) -> None:
        """Let a tenant's adapters go, but for those that are answering."""
        for prefix in [prefix for prefix in self._slots if tenant_of(prefix) == tenant]:
            if prefix not in self._num_users:
                self._base.bank.remove(self._slots.pop(prefix))

    @property
    def tenants(self) -> set[str]:
        """Whose adapters are in memory. From any thread."""
        return {tenant_of(prefix) for prefix in list(self._slots)}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def indices(self) -> set[int]:
        """Indices in the bank of the slots that are held here."""
        return {slot.index for slot in self._slots.values()}

    def _evict(self) -> None:
        for prefix in list(self._slots):
            if len(self._slots) <= self._max:
                return
            if prefix not in self._num_users:
                self._base.bank.remove(self._slots.pop(prefix))
