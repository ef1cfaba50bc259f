"""What a job will need in memory, before it runs.

Weights, adapters, gradients and optimizer state are counted. Activations are measured: a small forward under
`saved_tensors_hooks` tells which tensors the backward keeps, for any architecture, and their bytes grow with the
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from luthier.types import Example

PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All in bytes.

    Attributes:
        base: The resident weights.
        adapters, gradients, optimizer: Of all the jobs together.
        activations: What the largest joint forward keeps for its backward, with the output layer's chunk.
        tokens: Tokens in the largest joint forward.
        available: What the device has left for adapters, gradients, optimizer and activations; the base is loaded
            already.
        per_token: Activations of one token.
    """

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
    def total(self) -> int:
        return self.base + self.adapters + self.needed

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


def head_bytes_per_token(base: Base, slot: Slot | OwnSlot) -> int:
    """Bytes that one supervised token takes at the output layer beyond a chunk's, where its logits must exist at once.

    Logits, their float32 copy, the log-softmax and its gradient: a head that scales or caps, or that the slot changes.
    """
    if slot.head is not None:
        return 0
    if base.head_is_plain and base.bank.head_is_plain_for([Segment(slot.index, 0, 1)]):
        return 0
    return base.vocabulary_size * (base.dtype.itemsize + 3 * max(4, base.dtype.itemsize))


def _same(value: Any) -> Any:
    return value


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _cgroup_room())


def _cgroup_room() -> int:
    """Room under a container's memory limit; practically unlimited where there is none."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            return int(text) - int(current.read()) if text != "max" else 2**62
    except (OSError, ValueError):
        return 2**62


def plan_memory(base: Base, jobs: Sequence[TrainingJob], budget_tokens: int) -> MemoryPlan:
    """Predict what the jobs need together when a joint forward holds at most `budget_tokens`."""
    parameters = sum(
        p.numel() * p.element_size() for job in jobs for p in job.slot.parameters().values() if p.requires_grad
    )
    per_token = max(activation_bytes_per_token(base, job.slot) + head_bytes_per_token(base, job.slot) for job in jobs)
    largest = sum(largest_micro_batch(job) for job in jobs)
    alone = max(largest_micro_batch(job) for job in jobs)
    tokens = max(alone, min(largest, budget_tokens))
    # The output layer's chunk: logits and their gradient with respect to the hidden states; a layer out of NF4.
    head = 2 * 32 * 2**20 + 2 * tokens * base.hidden_size * 4 + base.dense_bytes
    fixed = max(activation_bytes_per_forward(base, job.slot) for job in jobs)
    return MemoryPlan(
        base=base.num_bytes,
        adapters=parameters,
        gradients=parameters,
        optimizer=sum(job.optimizer.state_bytes for job in jobs),
        activations=tokens * per_token + head + fixed,
        tokens=tokens,
        available=available_bytes(base.device),
        per_token=per_token,
    )


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


def fit_micro_batches(base: Base, jobs: Sequence[TrainingJob], budget_tokens: int, margin: float = 0.8) -> int:
    """Shrink micro-batches and the joint budget until the prediction fits `margin` of what is free.

    The optimizer batch stays as it is. A user's own `micro_batch_tokens` is shrunk too when it would not fit.

    Returns:
        The joint budget, in tokens.
    """
    memory = plan_memory(base, jobs, budget_tokens)
    fixed = memory.gradients + memory.optimizer + (memory.activations - memory.tokens * memory.per_token)
    room = int((memory.available * margin - fixed) // max(1, memory.per_token))
    budget = max(16, min(budget_tokens, room))
    for job in jobs:
        job.micro_batch_tokens = max(16, min(job.micro_batch_tokens, budget))
    return budget
