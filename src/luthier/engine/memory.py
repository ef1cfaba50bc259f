"""What a job needs in memory, before it runs: the one model that plans, admissions and runs share.

Weights, adapters, gradients and optimizer state are counted. Activations are measured: a small forward under
`saved_tensors_hooks` tells which tensors the backward keeps, for any architecture, and their bytes grow with the
tokens. They are measured on the base that is loaded, or on a skeleton of one and of two blocks
(`base/skeleton.py`), from which `JobCosts.of_blocks` goes on to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from luthier.base.load import Base
from luthier.engine.job import TrainingJob, split_by_tokens
from luthier.engine.own import OwnSlot
from luthier.engine.pack import PackItem, Segment, pack
from luthier.engine.slot import Slot
from luthier.objectives.language_modelling import CHUNK_BYTES, GPU_CHUNK_ROWS
from luthier.types import LEAST_MICRO_BATCH_TOKENS, Example

PROBE_TOKENS = 64

PROCESS_BYTES = 520 * 2**20
"""Resident on a CPU before the base is there: Python with torch (built for a CPU), transformers and peft, and the data
as it is read."""

HEAP_SLACK = 1.25
"""On a CPU, resident bytes a byte of activations: what the backward makes for a moment, and holes that tensors of other
sizes leave in the heap. `benchmarks/plan.py` fits both."""

MARGIN = 0.8
"""Share of the free memory that a run may plan to take."""

UNLIMITED = 2**62
"""Bytes, of a container without a limit."""


@dataclass(frozen=True, slots=True)
class JobCosts:
    """What one job takes on one base, in bytes.

    Attributes:
        adapters: What it trains.
        gradients, optimizer: Of that.
        largest: The largest trained tensor: its gradient is there twice while micro-batches are added up.
        per_token: Activations of one token.
        per_supervised_token: At the output layer, where its logits must exist at once.
        per_forward: Kept whatever the number of tokens.
    """

    adapters: int
    gradients: int
    optimizer: int
    largest: int
    per_token: int
    per_supervised_token: int
    per_forward: int

    @staticmethod
    def of_blocks(one: JobCosts, two: JobCosts, num_blocks: int) -> JobCosts:
        """Of a base of `num_blocks` blocks, from those of skeletons with one and with two."""

        def grown(name: str) -> int:
            first: int = getattr(one, name)
            return first + (num_blocks - 1) * (getattr(two, name) - first)

        names = ("adapters", "gradients", "optimizer", "largest", "per_token", "per_forward")
        return JobCosts(**{name: grown(name) for name in names}, per_supervised_token=two.per_supervised_token)


@dataclass(frozen=True, slots=True)
class Held:
    """A base as it is held, as far as memory is concerned.

    Attributes:
        weights: Bytes of the weights that do not train.
        dense: Of the largest quantized layer in numbers: what a product takes for a moment.
        device_type: "cpu" or "cuda".
        itemsize: Bytes of a value that is computed with.
    """

    weights: int
    dense: int
    hidden_size: int
    vocabulary_size: int
    device_type: str
    itemsize: int

    @classmethod
    def of(cls, base: Base) -> Held:
        """A base that is loaded."""
        return cls(
            base.num_bytes,
            base.dense_bytes,
            base.hidden_size,
            base.vocabulary_size,
            base.device.type,
            base.dtype.itemsize,
        )

    def head_bytes(self, num_tokens: int) -> int:
        """Of a chunk's logits with what is made of them, and of the hidden states' gradient."""
        gradient = 2 * num_tokens * self.hidden_size * 4
        if self.device_type == "cuda" and self.itemsize == 2:
            return min(num_tokens, GPU_CHUNK_ROWS) * self.vocabulary_size * self.itemsize + gradient
        rows = min(num_tokens, max(8, CHUNK_BYTES // (4 * self.vocabulary_size)))
        return 2 * rows * self.vocabulary_size * 4 + gradient


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All in bytes.

    Attributes:
        process: What the process holds besides, where that is in the same memory.
        base: The resident weights.
        adapters, gradients, optimizer: Of all the jobs together.
        activations: What the largest joint forward keeps for its backward, with the output layer's chunk.
        tokens: Tokens in the largest joint forward.
        available: What the device has left for gradients, optimizer and activations; base and adapters are there
            already.
        per_token: What grows with each of the tokens.
    """

    process: int
    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int
    available: int
    per_token: int

    @property
    def needed(self) -> int:
        """What is still to be taken once the base is loaded."""
        return self.gradients + self.optimizer + self.activations

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.process + self.base + self.adapters + self.needed

    @property
    def tokens_that_fit(self) -> int:
        """Tokens in the largest forward that a run would choose: `MARGIN` of what is free holds it."""
        fixed = self.gradients + self.optimizer + (self.activations - self.tokens * self.per_token)
        return max(0, int((self.available * MARGIN - fixed) // max(1, self.per_token)))

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


def activation_bytes_per_token(base: Base, slot: Slot | OwnSlot) -> int:
    """Bytes that the backward keeps for one token of `slot`, measured on a small batch without stepping anything.

    The output layer is left out; `head_bytes_per_token` counts it. An exclusive method may keep changed weights too,
    which do not grow with the tokens: `activation_bytes_per_forward` has them.
    """
    # Recomputed blocks keep their input alone, and not through a hook.
    hides = base.is_checkpointing and base.fast_body is None
    recomputed = base.config.get_text_config().num_hidden_layers * base.hidden_size if hides else 0
    per_token = _kept_bytes(base, slot, PROBE_TOKENS) // PROBE_TOKENS
    if isinstance(slot, OwnSlot):
        half = PROBE_TOKENS // 2
        per_token = (_kept_bytes(base, slot, PROBE_TOKENS) - _kept_bytes(base, slot, half)) // half
    return per_token + recomputed * base.dtype.itemsize


def activation_bytes_per_forward(base: Base, slot: Slot | OwnSlot) -> int:
    """Bytes that the backward keeps whatever the number of tokens: weights that an exclusive method has changed."""
    if not isinstance(slot, OwnSlot):
        return 0
    whole, half = (_kept_bytes(base, slot, num_tokens) for num_tokens in (PROBE_TOKENS, PROBE_TOKENS // 2))
    return max(0, 2 * half - whole)


def _kept_bytes(base: Base, slot: Slot | OwnSlot, num_tokens: int) -> int:
    """What one forward of one sequence keeps for its backward, weights and trained tensors left out."""
    kept: dict[tuple[int, int], int] = {}
    held: list[Tensor] = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*slot.parameters().values(), *slot.constants())}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | own:
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
            held.append(tensor)  # keeps the storage's address from being given to another tensor
        # Detached: a node that keeps its own output would hold itself, and what it keeps, for good.
        return tensor.detach()

    example = Example(np.zeros(num_tokens, dtype=np.int32), np.zeros(num_tokens, dtype=np.float32))
    batch = pack([PackItem(example, slot.index)], base.device)
    with base.bank.routed(base.routing(batch, training=True)), torch.autograd.graph.saved_tensors_hooks(count, _same):
        base.forward(batch)
    held.clear()  # the graph holds the hook, and the hook this list
    return sum(kept.values())


def head_bytes_per_token(base: Base, slot: Slot | OwnSlot, vocabulary_size: int | None = None) -> int:
    """Bytes that one supervised token takes at the output layer beyond a chunk's, where its logits must exist at once.

    Logits, their float32 copy, the log-softmax and its gradient: a head that scales or caps, or that the slot changes.
    """
    if slot.head is not None:
        return 0
    if base.head_is_plain and base.bank.head_is_plain_for([Segment(slot.index, 0, 1)]):
        return 0
    return (vocabulary_size or base.vocabulary_size) * (base.dtype.itemsize + 3 * max(4, base.dtype.itemsize))


def _same(value: Any) -> Any:
    return value


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _cgroup_room())


def available_to_others(device: torch.device) -> int:
    """Bytes that another process may take on `device`: of a GPU, not what this one keeps for itself."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes(device)


def total_bytes(device: torch.device) -> int:
    """Bytes that `device` has in all, whoever holds them; of a container, what it may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min(psutil.virtual_memory().total, _cgroup_limit())


def _cgroup_room() -> int:
    """Room under a container's memory limit; practically unlimited where there is none."""
    try:
        return _cgroup_limit() - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return UNLIMITED


def _cgroup_limit() -> int:
    """What a container may take of the memory."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return int(text) if text != "max" else UNLIMITED
    except (OSError, ValueError):
        return UNLIMITED


def measured_costs(base: Base, job: TrainingJob, vocabulary_size: int | None = None) -> JobCosts:
    """What a job takes on `base`, which is loaded or a skeleton.

    Args:
        vocabulary_size: Of the whole base, where a skeleton's is cut.
    """
    trained = [p.numel() * p.element_size() for p in job.slot.parameters().values() if p.requires_grad]
    return JobCosts(
        adapters=sum(trained),
        gradients=job.optimizer.gradient_bytes,
        optimizer=job.optimizer.state_bytes,
        largest=max(trained, default=0),
        per_token=activation_bytes_per_token(base, job.slot),
        per_supervised_token=head_bytes_per_token(base, job.slot, vocabulary_size),
        per_forward=activation_bytes_per_forward(base, job.slot),
    )


def plan_of(held: Held, costs: Sequence[JobCosts], num_tokens: int, available: int) -> MemoryPlan:
    """The sum: jobs of these costs, with at most `num_tokens` in a joint forward."""
    is_cpu = held.device_type == "cpu"
    slack = HEAP_SLACK if is_cpu else 1.0
    per_token = max(each.per_token * slack + each.per_supervised_token for each in costs)
    # Gradients come as activations go, and fill the holes of the heap first.
    gradients = sum(each.gradients for each in costs)
    filled = min(gradients, int(num_tokens * max(each.per_token for each in costs) * (slack - 1.0)))
    fixed = max(each.per_forward for each in costs) + held.dense + held.head_bytes(num_tokens)
    return MemoryPlan(
        process=PROCESS_BYTES if is_cpu else 0,
        base=held.weights,
        adapters=sum(each.adapters for each in costs),
        gradients=gradients + max(each.largest for each in costs),
        optimizer=sum(each.optimizer for each in costs),
        activations=num_tokens * int(per_token) + fixed - filled,
        tokens=num_tokens,
        available=available,
        per_token=int(per_token),
    )


def plan_memory(base: Base, jobs: Sequence[TrainingJob], budget_tokens: int) -> MemoryPlan:
    """Predict what the jobs need together when a joint forward holds at most `budget_tokens`."""
    costs = [measured_costs(base, job) for job in jobs]
    available = available_bytes(base.device) // base.num_sharing
    return plan_of(Held.of(base), costs, largest_forward(jobs, budget_tokens), available)


def largest_forward(jobs: Sequence[TrainingJob], budget_tokens: int) -> int:
    """Tokens in the largest joint forward; a micro-batch past the budget runs alone."""
    sizes = [largest_micro_batch(job) for job in jobs]
    return max(max(sizes), min(sum(sizes), budget_tokens))


def recompute_few(base: Base, jobs: Sequence[TrainingJob], budget_tokens: int) -> int:
    """Turn recomputation on for as few blocks as let the prediction fit, in quarters of them; returns how many.

    Only the fast body takes fewer than all.
    """
    num_layers = base.num_layers
    quarters = [num_layers * part // 4 for part in (1, 2, 3)] if base.fast_body is not None else []
    for count in quarters:
        base.set_checkpointing(True, count)
        if plan_memory(base, jobs, budget_tokens).fits:
            return count
    base.set_checkpointing(True)
    return num_layers


def largest_micro_batch(job: TrainingJob, num_batches: int = 200) -> int:
    """Tokens in the largest micro-batch among the job's first batches."""
    largest = 0
    for step in range(min(job.total_steps, num_batches)):
        items = [PackItem(job.examples[int(i)], job.slot.index) for i in job.batch_indices(step)]
        for part in split_by_tokens(items, job.micro_batch_tokens):
            largest = max(largest, sum(item.example.num_tokens for item in part))
    return largest


def fit_micro_batches(base: Base, jobs: Sequence[TrainingJob], budget_tokens: int) -> int:
    """Shrink micro-batches and the joint budget until the prediction fits `MARGIN` of what is free.

    The optimizer batch stays as it is. A user's own `micro_batch_tokens` is shrunk too when it would not fit.

    Returns:
        The joint budget, in tokens.
    """
    memory = plan_memory(base, jobs, budget_tokens)
    budget = max(LEAST_MICRO_BATCH_TOKENS, min(budget_tokens, memory.tokens_that_fit))
    for job in jobs:
        job.micro_batch_tokens = max(LEAST_MICRO_BATCH_TOKENS, min(job.micro_batch_tokens, budget))
    return budget
