"""A round of several ranks: who runs which sequences of an optimizer batch, and what is summed at its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from luthier.engine.job import TrainingJob
from luthier.engine.ranks import Ranks
from luthier.engine.step import SlotReport

BUCKET_BYTES = 64 * 2**20
"""Gradients are summed in pieces of about this size: a slot of the bank in one, a whole model without a second copy."""

_NUM_TOTALS = 6


def share_by_tokens(lengths: Sequence[int], loads: list[int]) -> list[list[int]]:
    """Share sequences out, so that ranks have about the same number of tokens: the longest first, to the least loaded.

    Graham 1969, "Bounds on multiprocessing timing anomalies": at most 4/3 of the best.

    Args:
        lengths: Tokens of each sequence.
        loads: Tokens that each rank has already, to which its share is added.

    Returns:
        Positions of each rank's sequences, ascending.
    """
    shares: list[list[int]] = [[] for _ in loads]
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        rank = loads.index(min(loads))
        shares[rank].append(position)
        loads[rank] += lengths[position]
    return [sorted(share) for share in shares]


def sum_batches(ranks: Ranks, jobs: Sequence[TrainingJob]) -> None:
    """Give every rank the totals and gradients of these jobs' whole optimizer batches: the same bytes on all.

    One sum over all jobs' totals, and one a slot. A parameter that no rank's share gave a gradient keeps none, so that
    it is stepped, or not, as in one process.

    Raises:
        ProcessLostError: when another rank is gone.
    """
    pieces = [job.optimizer.pieces() for job in jobs]
    rows = [_totals_row(job.totals, found) for job, found in zip(jobs, pieces, strict=True)]
    table = torch.cat(rows)
    ranks.sum_(table)
    for job, found, row in zip(jobs, pieces, table.split([len(row) for row in rows]), strict=True):
        nll, weight, num_tokens, num_supervised, right, judged = row[:_NUM_TOTALS].tolist()
        job.take_totals(SlotReport(nll, weight, int(num_tokens), int(num_supervised), right, int(judged)))
        trained = [p for p, count in zip(found, row[_NUM_TOTALS:].tolist(), strict=True) if count > 0]
        sum_gradients(ranks, trained)


def sum_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all ranks in place; where this rank has none, it adds nothing and takes the others'."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(parameters):
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        if len(gradients) == 1 and gradients[0].is_contiguous():
            ranks.sum_(gradients[0])
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        ranks.sum_(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _totals_row(totals: SlotReport, pieces: Sequence[nn.Parameter]) -> Tensor:
    """float64 [6 + pieces]: what was accumulated, and which parameters have a gradient."""
    numbers = [totals.nll_sum, totals.weight_sum, totals.num_tokens, totals.num_supervised_tokens]
    numbers += [totals.num_right, totals.num_judged]
    return torch.tensor([*numbers, *(piece.grad is not None for piece in pieces)], dtype=torch.float64)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """In order, each of one dtype and of about `BUCKET_BYTES` at most; a larger parameter is one by itself."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not buckets or size > room or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= size
    return buckets
