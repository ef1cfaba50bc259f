"""Ranks that are processes on one machine or several, by torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.errors import ProcessLostError

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others. The first may judge for hours meanwhile, and one that dies is noticed at once,
for its connections close; so this ends nothing but a process that was stopped and forgotten."""

MEETING = timedelta(minutes=10)
"""How long it looks for the place where they meet."""


class TorchRanks:
    """The processes of the default group. CPU tensors are summed by gloo, CUDA tensors by NCCL."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum_(self, tensor: Tensor) -> None:
        """As `Ranks.sum_`."""
        try:
            dist.all_reduce(tensor)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _lost(self.rank, error) from error


@contextmanager
def connected(rank: int, size: int, rendezvous: str, device: torch.device) -> Iterator[TorchRanks]:
    """Meet the other ranks, and part from them at the end.

    Args:
        rendezvous: Where they meet, as `torch.distributed.init_process_group` has it: "env://", or "file:///...".
        device: Where the base will be.

    Raises:
        ProcessLostError: when they cannot meet.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, *_ = next(dist.rendezvous(rendezvous, rank, size, timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        raise _lost(rank, error) from error
    try:
        yield TorchRanks(rank, size)
    finally:
        dist.destroy_process_group()


def _lost(rank: int, error: RuntimeError) -> ProcessLostError:
    reason = str(error).strip().partition("\n")[0]
    return ProcessLostError(
        f"rank {rank} has lost the other processes: {reason}",
        fix="see what the others say; --resume goes on from the last checkpoint",
    )
