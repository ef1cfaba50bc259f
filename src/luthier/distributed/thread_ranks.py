"""Ranks that are threads of one process: the public fake, by which a test shows what holds between ranks in a moment.

thread_ranks(2, lambda ranks: train_on(ranks))      # -> what each returned
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from luthier.errors import ProcessLostError

Result = TypeVar("Result")

PATIENCE_SECONDS = 60.0


class _Board:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[Tensor | None] = [None] * size


class ThreadRanks:
    """One thread's view. Sums that do not belong together are told apart: tensors of other shapes or types raise.

    Attributes:
        shapes: Of the tensors summed so far, in order.
    """

    def __init__(self, rank: int, board: _Board) -> None:
        self.rank, self.size = rank, len(board.parts)
        self.shapes: list[tuple[int, ...]] = []
        self._board = board

    def sum_(self, tensor: Tensor) -> None:
        """As `Ranks.sum_`; a rank that has ended, or waits elsewhere for a minute, is lost."""
        self.shapes.append(tuple(tensor.shape))
        self._board.parts[self.rank] = tensor.clone()
        self._wait()
        parts = [part for part in self._board.parts if part is not None]
        if any((part.shape, part.dtype) != (tensor.shape, tensor.dtype) for part in parts):
            raise ValueError(f"ranks sum tensors of different kinds: {[(p.shape, p.dtype) for p in parts]}")
        tensor.copy_(torch.stack(parts).sum(dim=0))
        self._wait()

    def leave(self) -> None:
        """Be gone: the others' sums raise from now on."""
        self._board.barrier.abort()

    def _wait(self) -> None:
        try:
            self._board.barrier.wait(PATIENCE_SECONDS)
        except threading.BrokenBarrierError:
            raise ProcessLostError(f"rank {self.rank} has lost the other threads") from None


def thread_ranks(size: int, work: Callable[[ThreadRanks], Result]) -> list[Result]:
    """Do `work` as every rank at once, and return what each gave; the first error of a rank that was not merely left.

    Raises:
        Exception: whatever a rank raised.
    """
    board = _Board(size)

    def run(rank: int) -> Result:
        ranks = ThreadRanks(rank, board)
        try:
            return work(ranks)
        except BaseException:
            ranks.leave()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, ProcessLostError)), errors[0])
    return [future.result() for future in futures]
