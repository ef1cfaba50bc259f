"""Bytes of model states that this rank holds, counted from its tensors; `engine/zero_states.py` predicts them.

Memory that several tensors share is counted once: a weight that is stepped where it is belongs to the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from luthier.base.load import Base
from luthier.base.own import OwnBase
from luthier.distributed.zero import ZeroOptimizer
from luthier.engine.adamw import MOMENTS
from luthier.engine.optimizer import JobOptimizer
from luthier.engine.zero_states import ModelStates


def held_states(base: Base, optimizer: JobOptimizer) -> ModelStates:
    """What is there now: gradients between a backward and the step, moments after the first step.

    Args:
        optimizer: Of the one job on `base`.
    """
    seen: set[int] = set()
    return ModelStates(*(_num_bytes(part, seen) for part in (_weights(base, optimizer), *_stepped(base, optimizer))))


def _weights(base: Base, optimizer: JobOptimizer) -> Iterator[Tensor]:
    masters = _masters(base)
    for parameter in (*base.model.parameters(), *optimizer.parameters.values()):
        if id(parameter) not in masters:
            yield parameter
            if (part := getattr(parameter, "ds_tensor", None)) is not None:
                yield part


def _masters(base: Base) -> dict[int, Tensor]:
    """float32 copies that are stepped in place of narrower weights."""
    if not isinstance(base, OwnBase):
        return {}
    return {id(p): p for name, p in base.slot.trained.items() if p is not base.slot.live[name]}


def _stepped(base: Base, optimizer: JobOptimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients, and the optimizer's own: copies that it steps, and moments."""
    parameters = [*optimizer.parameters.values(), *optimizer.pieces()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not isinstance(optimizer, ZeroOptimizer) or optimizer.partitions is None:
        return gradients, [*_masters(base).values(), *optimizer.state().values()]
    inner = optimizer.partitions
    gradients += [grad for p in parameters if (grad := getattr(p, "grad_accum", None)) is not None]
    groups = [*getattr(inner, "averaged_gradients", {}).values(), *getattr(inner, "all_grad_tensors", {}).values()]
    gradients += [tensor for group in groups if group is not None for tensor in group]
    gradients += getattr(inner, "accumulated_grads_in_cpu", {}).values()
    if (flat := getattr(inner, "grad_partitions_flat_buffer", None)) is not None:
        gradients.append(flat)
    stepped = optimizer.stepped_parts()
    known = [inner.optimizer.state[part] for part in stepped if part in inner.optimizer.state]
    return gradients, [*stepped, *(state[name] for state in known for name in MOMENTS)]


def _num_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of their memory, but for what was seen before."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
