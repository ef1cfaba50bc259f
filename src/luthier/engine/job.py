"""One job as the engine sees it: a slot, examples, an optimizer, and a cursor that is nothing but the step number.

Which examples make up step n, and where its micro-batches are cut, follows from the job's own seed and settings alone,
so a job trains the same in any company and takes up exactly where it stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from luthier.engine.optimizer import JobOptimizer
from luthier.engine.own import OwnSlot
from luthier.engine.pack import PackItem
from luthier.engine.slot import Slot
from luthier.engine.step import SlotReport
from luthier.types import NO_CLASS, Example, Examples, TrainSpec

DEFAULT_MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step of one job did.

    Attributes:
        job: The job's name.
        step: Steps done, this one included.
        epoch: Passes over the data done, as a fraction.
        loss: Mean loss over the optimizer batch, before the step.
        learning_rate, grad_norm: As used, and before clipping.
        num_tokens, num_supervised_tokens: Of the optimizer batch.
        seconds: Wall time of the forwards that the job took part in, shared out by tokens, and of its step.
        accuracy: Share of what the optimizer batch judges that was right before the step, as `SlotReport` counts it.
    """

    job: str
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised_tokens: int
    seconds: float
    accuracy: float


State = Literal["running", "paused", "done", "failed", "stopped"]


class TrainingJob:
    """A job in the engine.

    Args:
        name: Unique among the engine's jobs.
        slot: Its slot in the bank, or the one slot of a base that it owns.
        examples: What it trains on.
        spec: How.
        make_optimizer: Makes what steps the slot, of what `JobOptimizer` takes first.
    """

    def __init__(
        self,
        name: str,
        slot: Slot | OwnSlot,
        examples: Examples,
        spec: TrainSpec,
        make_optimizer: Callable[..., JobOptimizer] = JobOptimizer,
    ) -> None:
        if len(examples) == 0:
            raise ValueError(f"job {name} has no examples")
        self.name = name
        self.slot = slot
        self.examples = examples
        self.spec = spec
        self.micro_batch_tokens = spec.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS
        self.steps_per_epoch = math.ceil(len(examples) / spec.batch_size)
        self.total_steps = total_steps(len(examples), spec)
        self.optimizer = make_optimizer(
            slot.parameters(), spec, self.total_steps, slot.rate_ratios(), slot.hooks, slot.flat
        )
        self.state: State = "running"
        self.problem = ""
        self.num_tokens_done = 0
        self._pending: deque[list[PackItem]] = deque()
        self._has_begun = False
        self._mine: list[int] | None = None
        self._num_idle = 0
        self._order: tuple[int, np.ndarray] | None = None
        self._denominator = 0.0
        self._lengths: list[int] = []
        self._totals = SlotReport(0.0, 0.0, 0, 0)
        self._seconds = 0.0
        self._watch = LossWatch()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.optimizer.num_steps

    @property
    def is_active(self) -> bool:
        return self.state == "running" and self.step < self.total_steps

    @property
    def is_between_steps(self) -> bool:
        """Whether no part of an optimizer batch has been accumulated: the moment to save, pause or leave."""
        return self._totals.num_tokens == 0

    def batch_indices(self, step: int) -> np.ndarray:
        """Indices of the examples of optimizer step `step` (from 0).

        Each epoch is shuffled by itself, and its last batch may be smaller.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.spec.seed, epoch]).permutation(len(self.examples))
        order = self._order[1]
        return order[within * self.spec.batch_size : (within + 1) * self.spec.batch_size]

    def next_micro_batch(self) -> list[PackItem]:
        """The sequences that this job wants in the next forward."""
        self._begin_step()
        return self._pending[0]

    @property
    def batch_lengths(self) -> list[int]:
        """Tokens of each sequence of the current optimizer batch, whoever runs it."""
        self._begin_step()
        return self._lengths

    def keep_share(self, positions: list[int]) -> None:
        """Run these sequences of the current optimizer batch alone, for other processes run the rest."""
        self.restart_step()
        self._mine = positions
        self._begin_step()

    def keep_even_share(self, shares: Sequence[Sequence[int]], rank: int) -> None:
        """As `keep_share` for `shares[rank]`, in as many micro-batches as every rank has: what a rank lacks it idles.

        Sequences that carry no loss are counted and not run, for each forward must have its backward.
        """
        self.restart_step()
        self._begin_step()
        items = [item for micro in self._pending for item in micro]
        split = [
            split_by_tokens([items[at] for at in share if loss_weight(items[at].example) > 0], self.micro_batch_tokens)
            for share in shares
        ]
        silent = [items[at] for at in shares[rank] if loss_weight(items[at].example) == 0]
        self._totals = SlotReport(0.0, 0.0, sum(item.example.num_tokens for item in silent), 0)
        supervised = [item for item in items if loss_weight(item.example) > 0]
        self._num_idle = max(map(len, split)) - len(split[rank])
        shortest = min(supervised, key=lambda item: item.example.num_tokens, default=None)
        idle = [[shortest]] * self._num_idle if shortest is not None else []
        self._pending = deque([*split[rank], *idle])

    @property
    def is_idling(self) -> bool:
        """Whether the next micro-batch is there because other ranks have one, and counts for nothing."""
        return 0 < len(self._pending) <= self._num_idle

    @property
    def denominator(self) -> float:
        """Total weight of the current optimizer batch; endless where the next micro-batch counts for nothing."""
        return math.inf if self.is_idling else self._denominator

    @property
    def is_complete(self) -> bool:
        """Whether all that is to run here of the current optimizer batch has run: `finish_step` is next."""
        return self._has_begun and not self._pending

    @property
    def totals(self) -> SlotReport:
        """What the current optimizer batch has accumulated."""
        return self._totals

    def accumulate(self, report: SlotReport, seconds: float) -> None:
        """Take in the report on `next_micro_batch()`."""
        is_idle = self.is_idling
        self._pending.popleft()
        if is_idle:
            self._num_idle -= 1
            return
        totals = self._totals
        self._totals = SlotReport(
            totals.nll_sum + report.nll_sum,
            totals.weight_sum + report.weight_sum,
            totals.num_tokens + report.num_tokens,
            totals.num_supervised_tokens + report.num_supervised_tokens,
            totals.num_right + report.num_right,
            totals.num_judged + report.num_judged,
        )
        self._seconds += seconds

    def take_totals(self, totals: SlotReport) -> None:
        """Put in the place of what was accumulated here what all processes have accumulated together."""
        self._totals = totals

    def add_seconds(self, seconds: float) -> None:
        """Count wall time besides the forwards."""
        self._seconds += seconds

    def restart_step(self) -> None:
        """Drop what the current optimizer batch has accumulated, so that it starts again from its first micro-batch."""
        self.optimizer.zero_grad()
        self._pending.clear()
        self._num_idle = 0
        self._has_begun = False
        self._totals = SlotReport(0.0, 0.0, 0, 0)
        self._seconds = 0.0

    def shrink_micro_batch(self) -> bool:
        """Halve the micro-batch for want of memory and restart the step; False when it is down to one example."""
        self._begin_step()
        largest = max(sum(item.example.num_tokens for item in micro) for micro in self._pending)
        can_shrink = any(len(micro) > 1 for micro in self._pending)
        self.restart_step()
        if can_shrink:
            self.micro_batch_tokens = max(1, min(self.micro_batch_tokens, largest) // 2)
        return can_shrink

    def progress_state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides slot and optimizer, as JSON values."""
        return {
            "num_tokens_done": self.num_tokens_done,
            "micro_batch_tokens": self.micro_batch_tokens,
            "first_losses": list(self._watch.first),
            "recent_losses": list(self._watch.recent),
        }

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Take up what `progress_state()` gave."""
        self.restart_step()
        self.num_tokens_done = state["num_tokens_done"]
        self.micro_batch_tokens = state["micro_batch_tokens"]
        self._watch.first = list(state["first_losses"])
        self._watch.recent.extend(state["recent_losses"])

    def fail(self, problem: str) -> None:
        """End the job with a reason; the others go on."""
        self.restart_step()
        self.state, self.problem = "failed", problem

    def finish_step(self, norm: float | None = None) -> StepReport | None:
        """Step the optimizer, once the optimizer batch is complete; None where the job failed instead.

        Args:
            norm: The gradient's, where it has been read already.
        """
        self._has_begun, self._mine = False, None
        totals, seconds = self._totals, self._seconds
        if totals.weight_sum == 0:
            self.fail(f"no token of the rows of step {self.step + 1} carries loss; look at them with `luthier check`")
            return None
        loss = totals.nll_sum / totals.weight_sum
        problem = self._watch.problem(loss)
        self._totals, self._seconds = SlotReport(0.0, 0.0, 0, 0), 0.0
        if problem:
            self.fail(problem)
            return None
        norm, rate = self.optimizer.step(norm)
        if not math.isfinite(norm):
            self.fail(f"the gradient is not finite at step {self.step + 1}; {ADVICE}")
            return None
        self.num_tokens_done += totals.num_tokens
        if self.step >= self.total_steps:
            self.state = "done"
        return StepReport(
            self.name,
            self.step,
            self.step / self.steps_per_epoch,
            loss,
            rate,
            norm,
            totals.num_tokens,
            totals.num_supervised_tokens,
            seconds,
            totals.num_right / max(1, totals.num_judged),
        )

    # -- within a step

    def _begin_step(self) -> None:
        if self._has_begun:
            return
        indices = self.batch_indices(self.step)
        items = [PackItem(self.examples[int(i)], self.slot.index, (self.spec.seed, self.step, int(i))) for i in indices]
        if any(item.example.pair is not None and math.isnan(item.example.pair.reference) for item in items):
            raise ValueError(f"job {self.name} has pairs whose reference has not been computed: see engine/scoring.py")
        self._denominator = sum(loss_weight(item.example) for item in items)
        self._lengths = [item.example.num_tokens for item in items]
        mine = items if self._mine is None else [items[position] for position in self._mine]
        self._pending = deque(split_by_tokens(mine, self.micro_batch_tokens))
        self._has_begun = True


ADVICE = "lower train.learning_rate (try a tenth), or set train.warmup_steps, and look at the rows with `luthier check`"


class LossWatch:
    """Notices a loss that is not finite, or that has run away from where it started."""

    WINDOW = 5
    CEILING = 20.0

    def __init__(self) -> None:
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=self.WINDOW)

    def problem(self, loss: float) -> str:
        """Why training should end, or an empty string. Call once a step."""
        if not math.isfinite(loss):
            return f"the loss is {loss}; {ADVICE}"
        self.recent.append(loss)
        if len(self.first) < self.WINDOW:
            self.first.append(loss)
            return ""
        before, now = sum(self.first) / self.WINDOW, sum(self.recent) / self.WINDOW
        # Means over a window, for single rows differ widely; twice a small loss is no explosion, so 3 nats besides. It
        # may have exploded within the first window: guessing among a million tokens costs 14 nats.
        if now > min(max(2.0 * before, before + 3.0), self.CEILING):
            return f"the loss has exploded, from {before:.3g} over the first steps to {now:.3g} over the last; {ADVICE}"
        return ""


def total_steps(num_examples: int, spec: TrainSpec) -> int:
    """Optimizer steps of a job: batches of an epoch times epochs, rounded up, at most `max_steps`."""
    steps = math.ceil(math.ceil(num_examples / spec.batch_size) * spec.epochs)
    return min(steps, spec.max_steps) if spec.max_steps is not None else steps


def loss_weight(example: Example) -> float:
    """What an example adds to its job's denominator: its tokens' weights; 1 for a class, labels, each tag or a pair."""
    if example.pair is not None:
        return 1.0
    tags = 0 if example.tags is None else np.count_nonzero(example.tags != NO_CLASS)
    has_class = example.class_index != NO_CLASS or example.class_flags is not None
    return float(example.weights[1:].sum(dtype=np.float64)) + float(has_class) + float(tags)


def split_by_tokens(items: list[PackItem], max_tokens: int) -> list[list[PackItem]]:
    """Cut a list of examples, in order, into parts of at most `max_tokens`; a longer example is a part by itself.

    A pair is one example, so its two sides are never parted.
    """
    parts: list[list[PackItem]] = []
    room = 0
    for item in items:
        size = item.example.num_tokens
        if not parts or size > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(item)
        room -= size
    return parts
