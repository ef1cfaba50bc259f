"""Which rows are held out: chosen by their content, so that equal rows never stand on both sides."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def record_hash(canonical: str, seed: int = 0) -> int:
    """64 bits of a record's content, keyed by the seed: BLAKE2b over its canonical JSON."""
    digest = hashlib.blake2b(canonical.encode("utf-8"), digest_size=8, key=seed.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little")


def held_out(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Mark the rows to hold out: those with the smallest hashes, whole groups of equal rows at a time.

    Args:
        hashes: uint64 [num_rows]. `record_hash` of each row.
        share: Share of the rows to hold out, 0 to 0.5.

    Returns:
        bool [num_rows]. About `round(share * num_rows)` are true, at least one where the share is above 0 and there are
        two different rows; the last group may overshoot by its duplicates, but something always stays to train on.
        Adding rows to a file moves few of the others.
    """
    num_rows = len(hashes)
    marked = np.zeros(num_rows, dtype=np.bool_)
    if share <= 0 or num_rows < 2:
        return marked
    wanted = max(1, round(share * num_rows))
    threshold = np.partition(hashes, wanted - 1)[wanted - 1]
    marked = hashes <= threshold
    if marked.all():  # the last group is the rest of the file: leave it to the training rows
        marked = hashes < threshold
    return marked


def duplicates(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mark every row whose content stands earlier too: bool [num_rows]."""
    marked = np.ones(len(hashes), dtype=np.bool_)
    # A stable sort puts the first of equal rows first in its group.
    _, first = np.unique(hashes, return_index=True)
    marked[first] = False
    return marked
