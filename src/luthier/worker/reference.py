"""What a preference job is held to: the model that its training begins from, asked once about every pair.

That is the base without an adapter, or with the adapter of `start_from` where the job goes on from one. A run keeps the
answers in its folder. Where they are gone, as for a job that is taken up on another machine, they are asked anew before
the checkpoint's values are loaded, for then the slot still holds what training began from.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.base.adapter_files import WEIGHTS_FILE
from luthier.base.identity import weights_identity
from luthier.base.load import Base
from luthier.data.files import content_hash
from luthier.data.prepare import PreparedData
from luthier.data.store import ExampleStore, ReferencedStore
from luthier.engine.scoring import SCORE_TOKENS, reference_margins
from luthier.files import write_bytes
from luthier.worker.start import adapter_folder

FILE = "reference.npz"

OnPairs = Callable[[int, int], None]


def with_reference(
    data: PreparedData,
    base: Base,
    slot: int,
    folder: Path,
    start_from: str | None,
    *,
    on_pairs: OnPairs = lambda done, total: None,
    max_tokens: int = SCORE_TOKENS,
) -> PreparedData:
    """The run's data with the reference of every pair, from the run's folder or asked now.

    Args:
        slot: The reference: `BASE_SLOT`, or the slot that `start_from` was loaded into, before any step.
        folder: The run's.
        on_pairs: Told of the pairs done, and of how many there are.
    """
    stores = {"train": data.train} | ({} if data.validation is None else {"validation": data.validation})
    key = _key(data, base, start_from)
    margins = _kept(folder / FILE, key, stores)
    if margins is None:
        margins, done, total = {}, 0, sum(map(len, stores.values()))
        for name, store in stores.items():

            def note(count: int, before: int = done) -> None:
                on_pairs(before + count, total)

            margins[name] = reference_margins(base, store, slot, note, max_tokens)
            done += len(store)
        content = io.BytesIO()
        arrays: dict[str, Any] = {"key": np.array(key), **margins}
        np.savez(content, **arrays)
        write_bytes(folder / FILE, content.getvalue())
    found = {name: ReferencedStore(store, margins[name]) for name, store in stores.items()}
    return replace(data, train=found["train"], validation=found.get("validation"))


def _key(data: PreparedData, base: Base, start_from: str | None) -> str:
    """Names all that the margins depend on."""
    assert base.folder is not None
    start = "" if start_from is None else content_hash(adapter_folder(start_from) / WEIGHTS_FILE)
    parts = (data.folder.name, weights_identity(base.folder), base.quantization, str(base.dtype), start)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _kept(path: Path, key: str, stores: dict[str, ExampleStore]) -> dict[str, NDArray[np.float64]] | None:
    """The margins of an earlier time, where they are of the same pairs and reference."""
    try:
        with np.load(path) as kept:
            margins = {name: kept[name] for name in stores}
            is_same = str(kept["key"]) == key
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return margins if is_same and all(len(margins[name]) == len(store) for name, store in stores.items()) else None
