"""The engine: many jobs on one resident base, one forward and one backward for all of them at a time.

    engine = Engine(base)
    engine.add(TrainingJob("a", base.bank.add(spec, seed), examples, train_spec))
    while engine.has_work:
        for report in engine.step():
            ...

Jobs come, pause, resume, and leave between any two calls of `step`. Evaluation, checkpoints and reports are the
caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.base.load import Base
from luthier.engine.graphs import build_step_graphs
from luthier.engine.job import StepReport, TrainingJob
from luthier.engine.pack import PackItem, pack
from luthier.engine.planner import Offer, plan
from luthier.engine.ranks import ALONE, Ranks
from luthier.engine.rounds import share_by_tokens, sum_batches
from luthier.engine.step import train_step
from luthier.errors import MemoryShortError

DEFAULT_BUDGET_TOKENS = 4096


@dataclass(slots=True)
class _Group:
    share: float
    num_tokens_served: int

    @property
    def level(self) -> float:
        return self.num_tokens_served / self.share


class Engine:
    """Trains jobs on `base`.

    Args:
        base: The resident base.
        budget_tokens: Most tokens in one joint forward.
        lead_tokens: As `luthier.engine.planner.plan` takes it.
        ranks: The processes that train the same jobs together; each adds, removes and steps them alike.
    """

    def __init__(
        self,
        base: Base,
        budget_tokens: int = DEFAULT_BUDGET_TOKENS,
        lead_tokens: float = math.inf,
        ranks: Ranks = ALONE,
    ) -> None:
        self.base = base
        self.ranks = ranks
        self._has_rounds = ranks is not ALONE
        self.budget_tokens = budget_tokens
        self.lead_tokens = lead_tokens
        self.jobs: dict[str, TrainingJob] = {}
        self._served: dict[str, int] = {}
        self._graphs = build_step_graphs(base)
        self._group_of: dict[str, str] = {}
        self._groups: dict[str, _Group] = {}

    def add(self, job: TrainingJob, group: str = "", group_share: float = 1.0) -> None:
        """Take a job in. It starts level with the least served of the others, so that it neither jumps nor waits.

        Args:
            group: Whose it is. Groups are served by their shares, and within a group its jobs alike.
            group_share: The group's weight against the others'.
        """
        if job.name in self.jobs:
            raise ValueError(f"a job named {job.name} is here already")
        active = {name for name, other in self.jobs.items() if other.is_active}
        others = [self._served[name] for name in active if self._group_of[name] == group]
        if group and not others:
            levels = [self._groups[self._group_of[name]].level for name in active if self._group_of[name]]
            self._groups[group] = _Group(group_share, round(min(levels, default=0.0) * group_share))
        self._served[job.name] = min(others, default=0)
        self._group_of[job.name] = group
        self.jobs[job.name] = job

    def remove(self, name: str) -> TrainingJob:
        """Let a job go, wherever it stands; what a half-done optimizer batch had gathered is dropped."""
        job = self.jobs.pop(name)
        job.restart_step()
        del self._served[name]
        group = self._group_of.pop(name)
        if group not in self._group_of.values():
            self._groups.pop(group, None)
        return job

    @property
    def has_work(self) -> bool:
        return any(job.is_active for job in self.jobs.values())

    def step(self) -> list[StepReport]:
        """Run one forward and backward; returns a report for each job whose optimizer batch it completed.

        With several ranks it is a round: a whole optimizer batch of each job that the planner chooses. Every rank
        calls it alike, and runs its share in forwards of its own, as many as it needs. Which jobs are chosen and in
        which order they are summed follows from what all ranks know, so that none ever waits for a sum that another
        does not come to.

        Raises:
            torch.OutOfMemoryError, RuntimeError, MemoryError: when even one sequence of one job does not fit in memory.
            ProcessLostError: when another rank is gone.
        """
        active = [job for job in self.jobs.values() if job.is_active]
        if self._has_rounds:
            jobs = self._begin_round(active)
            while left := [job for job in jobs if not job.is_complete]:
                self._forward(self._choose(left))
        else:
            jobs = self._choose(active)
            self._forward(jobs)
        return self._finish([job for job in jobs if job.is_complete])

    def _choose(self, jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
        """The jobs whose next micro-batches share a forward."""
        offers = [self._offer(job, _num_tokens(job.next_micro_batch())) for job in jobs]
        return [self.jobs[name] for name in plan(offers, self.budget_tokens, self.lead_tokens)]

    def _begin_round(self, active: Sequence[TrainingJob]) -> list[TrainingJob]:
        """The jobs of a round, each left with what this rank runs of it: the same jobs in the same order on all."""
        offers = [self._offer(job, sum(job.batch_lengths)) for job in active]
        # Not `budget_tokens`, which falls where memory is short on one rank alone.
        names = plan(offers, DEFAULT_BUDGET_TOKENS * self.ranks.size, self.lead_tokens)
        jobs = [self.jobs[name] for name in names]
        loads = [0] * self.ranks.size
        for job in jobs:
            self._count_served(job, sum(job.batch_lengths))
            shares = share_by_tokens(job.batch_lengths, loads)
            if job.optimizer.shares_state:
                job.keep_even_share(shares, self.ranks.rank)
            else:
                job.keep_share(shares[self.ranks.rank])
        return jobs

    def _forward(self, jobs: list[TrainingJob]) -> None:
        """One forward and backward of these jobs' next micro-batches; where memory runs out, their steps begin anew."""
        micro = [job.next_micro_batch() for job in jobs]
        batch = pack([item for items in micro for item in items], self.base.device)
        started = time.perf_counter()
        try:
            denominators = {job.slot.index: job.denominator for job in jobs}
            backward = jobs[0].optimizer.backward if self._shares_state(jobs) else Tensor.backward
            reports = train_step(self.base, batch, denominators, self._graphs, backward)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._shares_state(jobs):  # the other ranks are in the middle of the same forward, and wait for this one
                raise MemoryShortError(
                    f"memory ran out in a forward of {batch.num_tokens:,} tokens",
                    "forwards that fit on every rank: under ZeRO none can become smaller by itself",
                    "lower train.micro_batch_tokens, or set train.gradient_checkpointing: on, and go on with --resume",
                ) from error
            self._make_room(jobs, error)
            return
        seconds = time.perf_counter() - started
        for job in jobs:
            report = reports[job.slot.index]
            if not self._has_rounds:
                self._count_served(job, report.num_tokens)
            job.accumulate(report, seconds * report.num_tokens / batch.num_tokens)

    def _shares_state(self, jobs: Sequence[TrainingJob]) -> bool:
        """Whether ranks hold parts of the one job's state, so that its gradients are not autograd's alone to make."""
        return any(job.optimizer.shares_state for job in jobs)

    def _finish(self, jobs: list[TrainingJob]) -> list[StepReport]:
        """Step jobs whose optimizer batch is complete."""
        if not jobs:
            return []
        started = time.perf_counter()
        if self._has_rounds:
            sum_batches(self.ranks, jobs)
        norms = self._gradient_norms(jobs)
        seconds = time.perf_counter() - started
        num_tokens = sum(job.totals.num_tokens for job in jobs)
        finished = []
        for job in jobs:
            job.add_seconds(seconds * job.totals.num_tokens / num_tokens)
            done = job.finish_step(norms.get(job.name))
            if done is not None:
                finished.append(done)
        return finished

    def _gradient_norms(self, jobs: list[TrainingJob]) -> dict[str, float]:
        """Of the jobs whose optimizer batch is complete, read at once: on a GPU every read waits for the device."""
        if self.base.device.type == "cpu" or self._shares_state(jobs):
            return {}
        norms = torch.stack([job.optimizer.finish_gradient() for job in jobs]).tolist()
        return {job.name: norm for job, norm in zip(jobs, norms, strict=True)}

    def _count_served(self, job: TrainingJob, num_tokens: int) -> None:
        self._served[job.name] += num_tokens
        if group := self._group_of[job.name]:
            self._groups[group].num_tokens_served += num_tokens

    def _offer(self, job: TrainingJob, num_tokens: int) -> Offer:
        served = self._served[job.name]
        name = self._group_of[job.name]
        if not name:
            return Offer(job.name, num_tokens, served)
        group = self._groups[name]
        return Offer(
            job.name,
            num_tokens,
            served,
            group=name,
            num_group_tokens_served=group.num_tokens_served,
            group_share=group.share,
        )

    def _make_room(self, jobs: list[TrainingJob], error: RuntimeError | MemoryError) -> None:
        """Memory ran short: first run fewer jobs together, then halve the micro-batch of the one that is left."""
        if self.base.device.type == "cuda":
            if self._graphs is not None:
                self._graphs.clear()
            torch.cuda.empty_cache()
        for job in jobs:
            job.restart_step()
        if len(jobs) > 1:
            self.budget_tokens = max(1, self.budget_tokens // 2)
        elif not jobs[0].shrink_micro_batch():
            raise error


def _num_tokens(items: Sequence[PackItem]) -> int:
    return sum(item.example.num_tokens for item in items)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)
