"""Low-rank updates of many slots as three products over sorted rows, without autograd.

Shapes: T rows, I inputs, O outputs, R rank, L layers, S slots of the batch, M tiles.

For the rows of slot s on layer l, with c = alpha / r:

    down:           low  = x A^T                    shrink
    up:             y   += c low B^T                expand
    backward:       glow = c g B                    shrink
                    dx  += glow A                   expand
                    dA  += glow^T x,  dB += c g^T low       outer

The gradients are added where the slot keeps them. The functions with a loop over slots are the plain reference; on a
GPU each product is one Triton launch for all slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luthier.ops.capability import is_interpreted, kernels_problem, num_processors

KERNEL_DTYPES = {torch.float32, torch.bfloat16}

SHORT_BATCH_ROWS = 8192
"""Batches of fewer rows are cut into smaller tiles, so that every multiprocessor has one."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One slot's factors on one layer.

    Attributes:
        a_RI, b_OR: The values; kernels read them in the dtype of the rows.
        grad_a_RI, grad_b_OR: Where their gradients add up, contiguous as the values are; None where none are wanted.
        scale: The factor c.
    """

    a_RI: Tensor
    b_OR: Tensor
    grad_a_RI: Tensor | None
    grad_b_OR: Tensor | None
    scale: float


class SlotFactors:
    """One slot's factors on every layer, with the numbers that a kernel reads.

    Attributes:
        layers: Per layer the factors, or None where the slot does not adapt it.
        dtypes: Of the values.
        addresses_L4: int64, addresses of A, B and their gradients.
        ranks_L: int32, 0 where there is no update.
        scales_L: float32.
    """

    def __init__(self, layers: Sequence[Factors | None]) -> None:
        self.layers = tuple(layers)
        self.dtypes = {factors.a_RI.dtype for factors in self.layers if factors is not None}
        self.addresses_L4 = np.zeros((len(layers), 4), dtype=np.int64)
        self.ranks_L = np.zeros(len(layers), dtype=np.int32)
        self.scales_L = np.zeros(len(layers), dtype=np.float32)
        for index, factors in enumerate(layers):
            if factors is None:
                continue
            tensors = (factors.a_RI, factors.b_OR, factors.grad_a_RI, factors.grad_b_OR)
            self.addresses_L4[index] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            self.ranks_L[index] = factors.a_RI.shape[0]
            self.scales_L[index] = factors.scale


class Updates:
    """The updates that act on a batch.

    Args:
        bounds: Rows [start, end) of each slot that has factors, ascending.
        slots: Their factors, for kernels in the rows' dtype.
        num_rows: Rows of the batch; rows of no slot keep the base's output.
    """

    def __init__(
        self, bounds: Sequence[tuple[int, int]], slots: Sequence[SlotFactors], num_rows: int, device: torch.device
    ) -> None:
        self.bounds = tuple(bounds)
        self.slots = tuple(slots)
        self.num_slots = len(slots)
        self.num_rows = num_rows
        self.device = device
        ranks_SL = np.stack([slot.ranks_L for slot in slots]) if slots else np.zeros((0, 0), dtype=np.int32)
        self.max_ranks: list[int] = ranks_SL.max(axis=0).tolist() if slots else []
        on_device = device.type == "cuda" or is_interpreted()
        self.uses_kernels = on_device and not kernels_problem() and all(slot.dtypes <= KERNEL_DTYPES for slot in slots)
        self.tile_rows = 128 if num_rows >= SHORT_BATCH_ROWS else 32
        if self.uses_kernels:
            arrays = kernel_arrays(bounds, slots, num_rows, self.tile_rows)
            self.tiles_M3, self.bounds_S2, self.table_LS4, self.ranks_LS, self.scales_LS = (
                to_device(array, device) for array in arrays
            )

    def acts_on(self, layer: int) -> bool:
        return bool(self.max_ranks) and self.max_ranks[layer] > 0


class StaticUpdates(Updates):
    """Updates of up to `num_slots` slots in memory that stays, for kernels of a captured graph to find them in.

    Args:
        max_ranks: Per layer the largest rank that `fill` will be given; 0 where nobody adapts it.
    """

    def __init__(self, num_slots: int, num_rows: int, max_ranks: Sequence[int], device: torch.device) -> None:
        super().__init__([], [], num_rows, device)
        self.num_slots, self.max_ranks = num_slots, list(max_ranks)
        shape = len(max_ranks), num_slots
        num_tiles = -(-num_rows // self.tile_rows) + 2 * num_slots + 1  # every bound may cut a tile in two
        self.tiles_M3 = torch.zeros(num_tiles, 3, dtype=torch.int32, device=device)
        self.bounds_S2 = torch.zeros(num_slots, 2, dtype=torch.int32, device=device)
        self.table_LS4 = torch.zeros(*shape, 4, dtype=torch.int64, device=device)
        self.ranks_LS = torch.zeros(*shape, dtype=torch.int32, device=device)
        self.scales_LS = torch.zeros(*shape, dtype=torch.float32, device=device)
        self.fill([], [])

    def fill(self, bounds: Sequence[tuple[int, int]], slots: Sequence[SlotFactors]) -> None:
        """Take in the slots of the next batch; places that are left over are empty."""
        self.bounds, self.slots = tuple(bounds), tuple(slots)
        tiles_M3, *arrays = kernel_arrays(bounds, slots, self.num_rows, self.tile_rows)
        spare_tiles = np.full((self.tiles_M3.shape[0] - tiles_M3.shape[0], 3), (-1, 0, 0), dtype=np.int32)
        targets = (self.bounds_S2, 0), (self.table_LS4, 1), (self.ranks_LS, 1), (self.scales_LS, 1)
        self.tiles_M3.copy_(pinned(np.concatenate([tiles_M3, spare_tiles]), self.device), non_blocking=True)
        for (target, axis), array in zip(targets, arrays, strict=True):
            whole = np.zeros(target.shape, dtype=array.dtype)
            if slots:
                whole[(slice(None),) * axis + (slice(0, len(slots)),)] = array
            target.copy_(pinned(whole, self.device), non_blocking=True)


def padded_rank(rank: int) -> int:
    """The columns that a low-rank side of `rank` is held in on a GPU: tensor cores take 16 or more."""
    return max(16, 1 << (rank - 1).bit_length())


def kernel_arrays(
    bounds: Sequence[tuple[int, int]], slots: Sequence[SlotFactors], num_rows: int, tile_rows: int
) -> tuple[np.ndarray, ...]:
    """Tiles [M, 3], bounds [S, 2], addresses [L, S, 4], ranks [L, S] and scales [L, S] as the kernels read them."""
    bounds_S2 = np.array(bounds, dtype=np.int32).reshape(-1, 2)
    if not slots:
        empty = np.zeros((0, 0), dtype=np.int32)
        table = np.zeros((0, 0, 4), dtype=np.int64), empty, empty.astype(np.float32)
    else:
        columns = zip(*((slot.addresses_L4, slot.ranks_L, slot.scales_L) for slot in slots), strict=True)
        table = tuple(np.stack(column, axis=1) for column in columns)  # type: ignore[assignment]
    return (tile_rows_of(bounds, num_rows, tile_rows), bounds_S2, *table)


def down(x_TI: Tensor, layer: int, updates: Updates) -> Tensor:
    """x A^T, [T, R padded]; rows without an update are undefined."""
    if updates.uses_kernels:
        return _shrink_kernel(x_TI, layer, updates, of_b=False)
    low_TR = _empty_low(x_TI, layer, updates)
    for (start, end), factors in _acting(layer, updates):
        rank = factors.a_RI.shape[0]
        torch.mm(x_TI[start:end].to(low_TR.dtype), factors.a_RI.t(), out=low_TR[start:end, :rank])
    return low_TR


def up_(y_TO: Tensor, low_TR: Tensor | None, layer: int, updates: Updates, residual_TO: Tensor | None = None) -> None:
    """y += c low B^T (+ residual) in place, rounded once. `low_TR` is None where no slot adapts the layer."""
    if updates.uses_kernels:
        _expand_kernel(y_TO, low_TR, layer, updates, residual_TO, of_b=True)
        return
    if residual_TO is not None:
        y_TO.add_(residual_TO)
    if low_TR is not None:
        for (start, end), factors in _acting(layer, updates):
            low_nR = low_TR[start:end, : factors.a_RI.shape[0]]
            _add_product_(y_TO[start:end], low_nR, factors.b_OR.t(), factors.scale)


def down_backward(grad_TO: Tensor, low_TR: Tensor, layer: int, updates: Updates) -> Tensor:
    """c g B, [T, R padded]; adds c g^T low to the gradient of B."""
    if updates.uses_kernels:
        _outer_kernel(grad_TO, low_TR, layer, updates, of_b=True)
        return _shrink_kernel(grad_TO, layer, updates, of_b=True)
    grad_low_TR = torch.empty_like(low_TR)
    for (start, end), factors in _acting(layer, updates):
        rank = factors.a_RI.shape[0]
        grad_nO = grad_TO[start:end].to(low_TR.dtype)
        torch.mm(grad_nO, factors.b_OR, out=grad_low_TR[start:end, :rank]).mul_(factors.scale)
        assert factors.grad_b_OR is not None
        # Transposed, for the product runs along the long rows then.
        factors.grad_b_OR.add_((low_TR[start:end, :rank].t() @ grad_nO).t(), alpha=factors.scale)
    return grad_low_TR


def up_backward_(
    grad_x_TI: Tensor | None, x_TI: Tensor | None, grad_low_TR: Tensor, layer: int, updates: Updates
) -> None:
    """dx += glow A in place, and dA += glow^T x; either is left out where its tensor is None."""
    if updates.uses_kernels:
        if grad_x_TI is not None:
            _expand_kernel(grad_x_TI, grad_low_TR, layer, updates, None, of_b=False)
        if x_TI is not None:
            _outer_kernel(x_TI, grad_low_TR, layer, updates, of_b=False)
        return
    for (start, end), factors in _acting(layer, updates):
        grad_nR = grad_low_TR[start:end, : factors.a_RI.shape[0]]
        if grad_x_TI is not None:
            _add_product_(grad_x_TI[start:end], grad_nR, factors.a_RI, 1.0)
        if x_TI is not None:
            assert factors.grad_a_RI is not None
            factors.grad_a_RI.addmm_(grad_nR.t(), x_TI[start:end].to(grad_nR.dtype))


def tile_rows_of(bounds: Sequence[tuple[int, int]], num_rows: int, size: int) -> np.ndarray:
    """int32 [M, 3]: segment (-1 for rows of no slot), first row and end of tiles that cover every row once."""
    tiles: list[tuple[int, int, int]] = []
    done = 0
    for segment, (start, end) in enumerate([*bounds, (num_rows, num_rows)]):
        tiles += [(-1, row, min(row + size, start)) for row in range(done, start, size)]
        tiles += [(segment, row, min(row + size, end)) for row in range(start, end, size)]
        done = max(done, end)
    return np.array(tiles, dtype=np.int32).reshape(-1, 3)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting for what it is doing."""
    return pinned(array, device).to(device, non_blocking=True)


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the host, where a GPU can fetch it by itself."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _acting(layer: int, updates: Updates) -> list[tuple[tuple[int, int], Factors]]:
    pairs = zip(updates.bounds, (slot.layers[layer] for slot in updates.slots), strict=True)
    return [(bounds, factors) for bounds, factors in pairs if factors is not None]


def _empty_low(x_TI: Tensor, layer: int, updates: Updates) -> Tensor:
    dtype = next(factors for _, factors in _acting(layer, updates)).a_RI.dtype
    return torch.empty(x_TI.shape[0], updates.max_ranks[layer], dtype=dtype, device=x_TI.device)


def _add_product_(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale * left @ right; through the wider dtype where they differ."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.add_((left @ right).mul_(scale).to(out.dtype))


def _shrink_kernel(wide_TC: Tensor, layer: int, updates: Updates, *, of_b: bool) -> Tensor:
    from luthier.ops.kernels import low_rank as kernels

    return kernels.shrink(
        wide_TC, updates.tiles_M3, updates.tile_rows, updates.table_LS4, updates.ranks_LS, updates.scales_LS,
        layer * updates.num_slots, updates.max_ranks[layer], kernels.B if of_b else kernels.A, of_b,
        num_processors(updates.device),
    )  # fmt: skip


def _expand_kernel(
    wide_TC: Tensor, low_TR: Tensor | None, layer: int, updates: Updates, residual_TC: Tensor | None, *, of_b: bool
) -> None:
    from luthier.ops.kernels import low_rank as kernels

    if low_TR is None and residual_TC is not None:
        wide_TC.add_(residual_TC)
    elif low_TR is not None:
        kernels.expand_(
            wide_TC, low_TR, residual_TC, updates.tiles_M3, updates.tile_rows, updates.table_LS4, updates.ranks_LS,
            updates.scales_LS, layer * updates.num_slots, kernels.B if of_b else kernels.A, of_b,
        )  # fmt: skip


def _outer_kernel(wide_TC: Tensor, low_TR: Tensor, layer: int, updates: Updates, *, of_b: bool) -> None:
    from luthier.ops.kernels import low_rank as kernels

    kernels.outer_(
        wide_TC, low_TR, updates.bounds_S2, updates.table_LS4, updates.ranks_LS, updates.scales_LS,
        layer * updates.num_slots, kernels.GRAD_B if of_b else kernels.GRAD_A, of_b, num_processors(updates.device),
    )  # fmt: skip
