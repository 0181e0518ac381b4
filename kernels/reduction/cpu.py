"""reduce_sum: rows added up column by column (a bias gradient), or the elements of each row.

Sums are cut into blocks of fixed size whose totals are added in order, in float64: no thread count changes a bit.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from minibert.kernels.cpu.bfloat16 import bits_of, loaded
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.threads import blocks, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array, is_bfloat16, takes_bfloat16

ROWS = 256  # of one block, added in the precision of the array
ELEMENTS = 1 << 14  # of one block of a long row
COST = 0.03  # nanoseconds an element, for `rows_worth_a_thread`: half the time of one core, as memory is shared


@jit
def column_sum_blocks(x: Array, zero: Any, partial: Array, start: int, stop: int) -> None:
    """`zero` has the dtype that sums are made in."""
    columns = x.shape[1]
    total = np.full(columns, zero)
    for block in range(start, stop):
        for j in range(columns):
            total[j] = 0
        first, last = block * ROWS, min((block + 1) * ROWS, x.shape[0])
        fours = last - (last - first) % 4
        for i in range(first, fours, 4):  # four rows for one pass over the totals
            a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
            for j in range(columns):
                total[j] += (loaded(a[j]) + loaded(b[j])) + (loaded(c[j]) + loaded(d[j]))
        for i in range(fours, last):
            row = x[i]
            for j in range(columns):
                total[j] += loaded(row[j])
        block_total = partial[block]
        for j in range(columns):
            block_total[j] = total[j]


@jit
def row_sum_blocks(x: Array, partial: Array, start: int, stop: int) -> None:
    for block in range(start, stop):
        i, k = block // partial.shape[1], block % partial.shape[1]
        part = x[i, k * ELEMENTS : (k + 1) * ELEMENTS]
        total = 0.0
        for j in range(part.size):
            total += np.float64(loaded(part[j]))
        partial[i, k] = total


@takes_bfloat16
def reduce_sum(x: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    summed = range(x.ndim) if axis is None else [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    kept = [a for a in range(x.ndim) if a not in summed]
    shape = tuple(x.shape[a] for a in kept)
    length = prod(x.shape[a] for a in summed)
    if kept and list(summed) == list(range(len(summed))):  # the leading axes
        total = _column_sums(np.ascontiguousarray(x).reshape(length, prod(shape)))
    else:
        total = _row_sums(np.ascontiguousarray(x.transpose(*kept, *summed)).reshape(prod(shape), length))
    if is_bfloat16(x):
        return total.astype(np.float32).astype(x.dtype).reshape(shape)
    return total.astype(x.dtype).reshape(shape)


def _column_sums(x: Array) -> Array:
    """(R, C) -> (C,)"""
    partial = np.empty((blocks(x.shape[0], ROWS), x.shape[1]))
    zero = (np.float32 if is_bfloat16(x) else x.dtype.type)(0)
    run_rows(
        column_sum_blocks, len(partial), bits_of(x), zero, partial, grain=rows_worth_a_thread(ROWS * x.shape[1], COST)
    )
    return partial.sum(axis=0)


def _row_sums(x: Array) -> Array:
    """(K, R) -> (K,)"""
    partial = np.empty((x.shape[0], blocks(x.shape[1], ELEMENTS)))
    run_rows(
        row_sum_blocks, partial.size, bits_of(x), partial, grain=rows_worth_a_thread(min(x.shape[1], ELEMENTS), COST)
    )
    return partial.sum(axis=1)
