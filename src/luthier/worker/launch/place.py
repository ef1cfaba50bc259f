"""A process's place among those that train together, and how it learns of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from luthier.errors import RunError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a process stands.

    Attributes:
        rank: Its number, from 0. The first alone writes and speaks.
        size: How many train together.
        local_rank, local_size: The same among those of its machine: which GPU it takes, and with how many it shares
            cores and memory.
        rendezvous: Where they meet, as torch.distributed has it: "env://" or "file:///...".
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    rendezvous: str = ""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


BY_ITSELF = RankPlace()
"""The place of a process that trains alone."""


def place_of_process(environment: Mapping[str, str] = os.environ) -> RankPlace | None:
    """The place that torchrun gave this process, or a launcher with the same variables; None where nobody did.

    Raises:
        RunError: for variables that do not hold.
    """
    if any(name not in environment for name in _NAMES):
        return None
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_size = int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", size)))
        local_rank = int(environment.get("LOCAL_RANK", rank % local_size))
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        found = ", ".join(f"{name}={environment[name]}" for name in environment if name in (*_NAMES, "LOCAL_RANK"))
        raise RunError(
            f"the environment gives this process no place among others: {found}",
            "RANK below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, as torchrun sets them",
            "start it with torchrun, or take these variables away",
        ) from None
    return RankPlace(rank, size, local_rank, local_size, "env://")
