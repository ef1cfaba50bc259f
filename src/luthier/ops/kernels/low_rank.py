"""The three products of low-rank updates, over the rows of many slots in one launch each.

Shapes: T rows, C columns of the wide side, R rank (padded to a power of two), L layers, S slots of the batch, M tiles.

A program finds its slot through a tile of rows (`tiles_M3`: segment, first row, end) or a segment's bounds, and the
slot's factors through their addresses (`table_LS4`: A, B and their gradients), so that one launch, and one captured
graph, serves any slots. Factors are [R, C] (A) or [C, R] (B) in the rows' dtype, their gradients in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.ops.low_rank import padded_rank

A, B, GRAD_A, GRAD_B = range(4)
"""Columns of the address table."""


@triton.jit(do_not_specialize=["first"])
def _shrink(
    wide, low, tiles, table, ranks, scales, num_columns, wide_stride, split_stride, span, first,
    COLUMN: tl.constexpr, BY_RANK: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """low[t, r] = sum over c of wide[t, c] factor[r, c], over columns [split * span, (split + 1) * span)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    segment = tl.load(tiles + tile * 3)
    if segment < 0:
        return
    rank = tl.load(ranks + first + segment)
    if rank == 0:
        return
    factor = tl.load(table + (first + segment) * 4 + COLUMN).to(tl.pointer_type(wide.dtype.element_ty))
    rows = tl.load(tiles + tile * 3 + 1) + tl.arange(0, ROWS)
    is_row = rows < tl.load(tiles + tile * 3 + 2)
    of_rank = tl.arange(0, RANK)
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    begin = split * span
    lines = wide + rows.to(tl.int64)[:, None] * wide_stride
    for offset in range(0, span, COLS):
        columns = begin + offset + tl.arange(0, COLS)
        if BY_RANK:
            at = columns[:, None] * rank + of_rank[None, :]
        else:
            at = of_rank[None, :] * num_columns + columns[:, None]
        if EVEN:
            values = tl.load(lines + columns[None, :], mask=is_row[:, None], other=0.0)
            part = tl.load(factor + at, mask=of_rank[None, :] < rank, other=0.0)
        else:
            is_column = columns < num_columns
            values = tl.load(lines + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
            part = tl.load(factor + at, mask=is_column[:, None] & (of_rank[None, :] < rank), other=0.0)
        total = tl.dot(values, part, total, input_precision=PRECISION)
    if SCALED:
        total = total * tl.load(scales + first + segment)
    where = low + split * split_stride + rows.to(tl.int64)[:, None] * RANK + of_rank[None, :]
    tl.store(where, total.to(low.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _settle(parts, low, size, split_stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """low = the sum of the splits' parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * split_stride + at, mask=at < size, other=0.0)
    tl.store(low + at, total.to(low.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["first"])
def _expand(
    wide, low, residual, tiles, table, ranks, scales, num_columns, wide_stride, first,
    COLUMN: tl.constexpr, BY_RANK: tl.constexpr, SCALED: tl.constexpr, ADDS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """wide[t, c] += sum over r of low[t, r] factor[r, c], and with ADDS += residual[t, c]."""
    tile = tl.program_id(0)
    segment = tl.load(tiles + tile * 3)
    rows = tl.load(tiles + tile * 3 + 1) + tl.arange(0, ROWS)
    is_row = rows < tl.load(tiles + tile * 3 + 2)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    is_column = columns < num_columns
    inside = is_row[:, None] & is_column[None, :]
    rank = 0
    if segment >= 0:
        rank = tl.load(ranks + first + segment)
    if (rank > 0) | ADDS:
        where = wide + rows.to(tl.int64)[:, None] * wide_stride + columns[None, :]
        total = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            beside = residual + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
            total += tl.load(beside, mask=inside, other=0.0).to(tl.float32)
        if rank > 0:
            factor = tl.load(table + (first + segment) * 4 + COLUMN).to(tl.pointer_type(wide.dtype.element_ty))
            of_rank = tl.arange(0, RANK)
            if BY_RANK:
                at = columns[None, :] * rank + of_rank[:, None]
            else:
                at = of_rank[:, None] * num_columns + columns[None, :]
            part = tl.load(factor + at, mask=is_column[None, :] & (of_rank[:, None] < rank), other=0.0)
            short = tl.load(low + rows.to(tl.int64)[:, None] * RANK + of_rank[None, :], mask=is_row[:, None], other=0.0)
            update = tl.dot(short, part, input_precision=PRECISION)
            if SCALED:
                update = update * tl.load(scales + first + segment)
            total += update
        tl.store(where, total.to(wide.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _outer(
    wide, low, bounds, table, ranks, scales, num_columns, wide_stride, first,
    COLUMN: tl.constexpr, BY_RANK: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradient[r, c] += sum over the slot's t of low[t, r] wide[t, c]."""
    segment = tl.program_id(1)
    rank = tl.load(ranks + first + segment)
    if rank == 0:
        return
    start = tl.load(bounds + segment * 2)
    end = tl.load(bounds + segment * 2 + 1)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - start, SPLITS), ROWS) * ROWS
        start += tl.program_id(2) * share
        end = tl.minimum(end, start + share)
    if start >= end:
        return
    columns = tl.program_id(0) * COLS + tl.arange(0, COLS)
    is_column = columns < num_columns
    of_rank = tl.arange(0, RANK)
    total = tl.zeros([COLS, RANK], dtype=tl.float32)
    for row in range(start, end, ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        is_row = rows < end
        at = rows[:, None] * wide_stride + columns[None, :]
        if EVEN:
            values = tl.load(wide + at, mask=is_row[:, None], other=0.0)
        else:
            values = tl.load(wide + at, mask=is_row[:, None] & is_column[None, :], other=0.0)
        short = tl.load(low + rows[:, None] * RANK + of_rank[None, :], mask=is_row[:, None], other=0.0)
        total = tl.dot(tl.trans(values), short, total, input_precision=PRECISION)
    if SCALED:
        total = total * tl.load(scales + first + segment)
    gradient = tl.load(table + (first + segment) * 4 + COLUMN).to(tl.pointer_type(tl.float32))
    if BY_RANK:
        at = columns[:, None] * rank + of_rank[None, :]
    else:
        at = of_rank[None, :] * num_columns + columns[:, None]
    inside = is_column[:, None] & (of_rank[None, :] < rank)
    if SPLITS > 1:
        tl.atomic_add(gradient + at, total, mask=inside, sem="relaxed")
    else:
        tl.store(gradient + at, tl.load(gradient + at, mask=inside, other=0.0) + total, mask=inside)


SHRINK = {"COLS": 256, "num_warps": 8, "num_stages": 3}
EXPAND = {"COLS": 128, "num_warps": 4}
OUTER = {"ROWS": 64, "COLS": 128, "num_warps": 4, "num_stages": 4}
WIDE_SHRINK = {"COLS": 32, "num_warps": 4, "num_stages": 2}
WIDE_EXPAND = {"COLS": 64, "num_warps": 4}
WIDE_OUTER = {"ROWS": 32, "COLS": 32, "num_warps": 4, "num_stages": 2}
"""Block shapes, and those for ranks past 64, whose tiles take more room."""


def shrink(
    wide_TC: Tensor, tiles_M3: Tensor, tile_rows: int, table: Tensor, ranks: Tensor, scales: Tensor, first: int,
    max_rank: int, column: int, scaled: bool, num_processors: int,
) -> Tensor:  # fmt: skip
    """[T, padded rank] in the dtype of `wide`; rows of no slot, or without an update here, are left undefined."""
    num_rows, num_columns = wide_TC.shape
    rank = padded_rank(max_rank)
    shape = SHRINK if rank <= 64 else WIDE_SHRINK
    columns = shape["COLS"]
    num_tiles = tiles_M3.shape[0]
    steps = triton.cdiv(num_columns, columns)
    splits = max(1, min(steps // 4, num_processors // max(1, num_tiles), 8))
    span = triton.cdiv(steps, splits) * columns
    splits = triton.cdiv(num_columns, span)
    low_TR = torch.empty(num_rows, rank, dtype=wide_TC.dtype, device=wide_TC.device)
    parts = low_TR
    if splits > 1:
        parts = torch.empty(splits, num_rows, rank, dtype=torch.float32, device=wide_TC.device)
    _shrink[(num_tiles, splits)](
        wide_TC, parts, tiles_M3, table, ranks, scales, num_columns, wide_TC.stride(0), num_rows * rank, span, first,
        COLUMN=column, BY_RANK=column == B, SCALED=scaled, EVEN=splits * span == num_columns, ROWS=tile_rows,
        RANK=rank, PRECISION=_precision(wide_TC), **shape,
    )  # fmt: skip
    if splits > 1:
        size = num_rows * rank
        _settle[(triton.cdiv(size, 1024),)](parts, low_TR, size, size, SPLITS=splits, BLOCK=1024)
    return low_TR


def expand_(
    wide_TC: Tensor, low_TR: Tensor, residual_TC: Tensor | None, tiles_M3: Tensor, tile_rows: int,
    table: Tensor, ranks: Tensor, scales: Tensor, first: int, column: int, scaled: bool,
) -> None:  # fmt: skip
    num_columns, rank = wide_TC.shape[1], low_TR.shape[1]
    shape = EXPAND if rank <= 64 else WIDE_EXPAND
    _expand[(tiles_M3.shape[0], triton.cdiv(num_columns, shape["COLS"]))](
        wide_TC, low_TR, residual_TC if residual_TC is not None else wide_TC, tiles_M3, table, ranks, scales,
        num_columns, wide_TC.stride(0), first, COLUMN=column, BY_RANK=column == B, SCALED=scaled,
        ADDS=residual_TC is not None, ROWS=tile_rows, RANK=rank, PRECISION=_precision(wide_TC), **shape,
    )  # fmt: skip


def outer_(
    wide_TC: Tensor, low_TR: Tensor, bounds_S2: Tensor, table: Tensor, ranks: Tensor, scales: Tensor, first: int,
    column: int, scaled: bool, num_processors: int,
) -> None:  # fmt: skip
    (num_rows, num_columns), rank = wide_TC.shape, low_TR.shape[1]
    shape = OUTER if rank <= 64 else WIDE_OUTER
    num_blocks, num_slots = triton.cdiv(num_columns, shape["COLS"]), bounds_S2.shape[0]
    # Few blocks leave the GPU idle: then each slot's rows are shared out, and their sums meet by atomic additions.
    splits = max(1, min(16, 3 * num_processors // (num_blocks * num_slots), num_rows // num_slots // 512))
    splits = 1 << (splits.bit_length() - 1)
    _outer[(num_blocks, num_slots, splits)](
        wide_TC, low_TR, bounds_S2, table, ranks, scales, num_columns, wide_TC.stride(0), first,
        COLUMN=column, BY_RANK=column == GRAD_B, SCALED=scaled, EVEN=num_columns % shape["COLS"] == 0, SPLITS=splits,
        RANK=rank, PRECISION=_precision(wide_TC), **shape,
    )  # fmt: skip


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
