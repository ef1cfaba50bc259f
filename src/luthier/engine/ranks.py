"""The processes that train the same jobs together, as the engine sees them: a number each, and one verb.

Every rank holds the whole base and every job, runs its share of each optimizer batch, and takes the same steps from the
same sums; so what else they need of one another is made from sums too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from luthier.errors import RunError


class Ranks(Protocol):
    """All of them, from the place of one.

    Attributes:
        rank: This process's number, from 0. The first alone writes.
        size: How many there are.
    """

    rank: int
    size: int

    def sum_(self, tensor: Tensor) -> None:
        """Put the sum over all ranks into `tensor`, the same bytes on each.

        Args:
            tensor: Contiguous; of one shape and dtype on all ranks, which call this the same number of times in the
                same order.

        Raises:
            ProcessLostError: when another rank is gone.
        """


class Alone:
    """One process: nothing is summed, and nothing costs anything."""

    rank = 0
    size = 1

    def sum_(self, tensor: Tensor) -> None:
        """It is the sum already."""


ALONE = Alone()


def wait_for_all(ranks: Ranks) -> None:
    """Return once every rank has come here."""
    ranks.sum_(torch.zeros(1))


def any_of(ranks: Ranks, value: bool) -> bool:
    """Whether `value` holds on some rank; the same answer on all."""
    if ranks is ALONE:
        return value
    count = torch.tensor([float(value)])
    ranks.sum_(count)
    return bool(count > 0)


def least_of(ranks: Ranks, value: int) -> int:
    """The least of all ranks' values; the same on all."""
    found = torch.zeros(ranks.size, dtype=torch.int64)
    found[ranks.rank] = value
    ranks.sum_(found)
    return int(found.min())


def check_alike(ranks: Ranks, tensors: Iterable[Tensor], what: str) -> None:
    """Compare a digest of `tensors` over the ranks.

    Args:
        what: What they are, for the error.

    Raises:
        RunError: on every rank, naming those whose bytes are not the first one's.
    """
    if ranks is ALONE:
        return
    found = torch.zeros(ranks.size, dtype=torch.int64)
    found[ranks.rank] = _digest(tensors)
    ranks.sum_(found)
    others = [rank for rank in range(1, ranks.size) if found[rank] != found[0]]
    if others:
        raise RunError(
            f"{what} differs between rank 0 and rank {', '.join(map(str, others))}",
            "the same bytes on all, for all take the same steps",
            "go on from the last checkpoint with --resume, on machines of one kind with the same packages",
        )


def _digest(tensors: Iterable[Tensor]) -> int:
    """63 bits of a hash over the bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big") >> 1
