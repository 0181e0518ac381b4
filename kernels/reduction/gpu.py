"""reduce_sum on CUDA: of the rows or of the columns of a matrix; other axes are brought there first.

Long sums are cut into parts of fixed length whose sums are float32: no grid and no device changes a bit.
"""

from __future__ import annotations

from math import prod

import numpy as np

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for

BLOCK = 256
WARP = 32
WARPS = BLOCK // WARP
PART = 2048  # elements of a row that a warp adds, as in gpu.cu
ROWS = 64  # rows of a column that a block adds, as in gpu.cu

cuda = CudaFile(__file__)
row_sums = cuda.kernel("row_sums", block=BLOCK)
row_parts = cuda.kernel("row_parts", block=BLOCK)
add_row_parts = cuda.kernel("add_row_parts", block=BLOCK)
column_sums = cuda.kernel("column_sums", block=BLOCK)
column_parts = cuda.kernel("column_parts", block=BLOCK)
add_column_parts = cuda.kernel("add_column_parts", block=BLOCK)


def reduce_sum(x: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    axes = range(x.ndim) if axis is None else [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    summed = [a for a in range(x.ndim) if a in axes]
    kept = [a for a in range(x.ndim) if a not in axes]
    shape = tuple(x.shape[a] for a in kept)
    count, length = prod(shape), prod(x.shape[a] for a in summed)
    if length == 0:
        return x.device.zeros(shape, x.dtype)
    if length == 1:
        return x.reshape(shape).copy()
    last_is_kept = bool(kept) and kept[-1] > summed[-1]  # then its elements stay neighbours, also where axes move
    if last_is_kept:
        return _column_sums(x.transpose((*summed, *kept)).contiguous(), length, count).reshape(shape)
    return _row_sums(x.transpose((*kept, *summed)).contiguous(), count, length).reshape(shape)


def _row_sums(x: Array, rows: int, columns: int) -> Array:
    """(rows, columns) -> (rows,)"""
    device = x.device
    total = device.empty((rows,), x.dtype)
    grid = blocks_for(rows, WARPS, device)
    if columns <= PART:
        row_sums(x, total, rows, columns, grid=grid)
        return total
    partial = x
    while columns > PART:
        x, parts = partial, -(-columns // PART)
        partial = device.empty((rows, parts), np.float32)
        row_parts(x, partial, rows, columns, grid=blocks_for(rows * parts, WARPS, device))
        columns = parts
    add_row_parts(partial, total, rows, columns, grid=grid)
    return total


def _column_sums(x: Array, rows: int, columns: int) -> Array:
    """(rows, columns) -> (columns,)"""
    device = x.device
    total = device.empty((columns,), x.dtype)
    if rows <= ROWS:
        column_sums(x, total, rows, columns, grid=_tiles(x, rows, columns))
        return total
    partial = x
    while rows > ROWS:
        x, parts = partial, -(-rows // ROWS)
        partial = device.empty((parts, columns), np.float32)
        column_parts(x, partial, rows, columns, grid=_tiles(x, rows, columns))
        rows = parts
    add_column_parts(partial, total, rows, columns, grid=blocks_for(-(-columns // WARP), 1, device))
    return total


def _tiles(x: Array, rows: int, columns: int) -> int:
    """Blocks for tiles of ROWS rows and the columns that a warp reads at once: a pack a lane, else an element."""
    pack = 16 // x.itemsize
    strip = WARP * (pack if columns % pack == 0 else 1)
    return blocks_for(-(-rows // ROWS) * -(-columns // strip), 1, x.device)
