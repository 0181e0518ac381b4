"""embedding adds rows of tables, gather_rows copies them; scatter_rows and add_rows add rows into one.

These two sort the rows by where they go, so that what an output row gets is the sum of one run, made by one thread: no
atomics, the same order each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from minibert.kernels.cpu.arrays import contiguous, row_numbers
from minibert.kernels.cpu.bfloat16 import narrowed, widened
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.op import Array, is_bfloat16, library, takes_bfloat16

COST = 0.12  # nanoseconds an element, for `rows_worth_a_thread`


@jit
def embedding_rows(
    word: Array,
    position: Array,
    token_type: Array,
    ids: Array,
    positions: Array,
    types: Array,
    y: Array,
    start: int,
    stop: int,
) -> None:
    for n in range(start, stop):
        word_row, position_row, type_row = word[ids[n]], position[positions[n]], token_type[types[n]]
        y_row = y[n]
        for j in range(y_row.size):
            y_row[j] = word_row[j] + position_row[j] + type_row[j]


@takes_bfloat16
def embedding(
    word: Array, position: Array, token_type: Array, input_ids: Array, position_ids: Array, token_type_ids: Array,
    *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    columns = word.shape[1]
    ids = (
        row_numbers(input_ids, len(word), "input_ids"),
        row_numbers(position_ids, len(position), "position_ids"),
        row_numbers(token_type_ids, len(token_type), "token_type_ids"),
    )
    if not input_ids.shape == position_ids.shape == token_type_ids.shape:
        shapes = f"{input_ids.shape}, {position_ids.shape}, {token_type_ids.shape}"
        raise ValueError(f"expected word, position and type ids of one shape, got {shapes}")
    if is_bfloat16(word):  # only the rows that are read go to float32
        read = [_rows_in_float32(*one) for one in zip((word, position, token_type), ids, strict=True)]
        y = embedding(*(table for table, _ in read), *(numbers.reshape(input_ids.shape) for _, numbers in read))
        return narrowed(y, word.dtype)
    tables = (
        np.ascontiguousarray(word),
        contiguous(position, (len(position), columns), "position"),
        contiguous(token_type, (len(token_type), columns), "token_type"),
    )
    y = np.empty((*input_ids.shape, columns), word.dtype)
    rows = y.reshape(-1, max(1, columns))
    run_rows(embedding_rows, len(rows), *tables, *ids, rows, grain=rows_worth_a_thread(columns, COST))
    return y


def _rows_in_float32(table: Array, ids: Array) -> tuple[Array, Array]:
    """A table of bfloat16 with no rows but those that are named, and their numbers in it."""
    named, numbers = np.unique(ids, return_inverse=True)
    return widened(table[named]), numbers


@library
@takes_bfloat16
def gather_rows(x: Array, index: Array, *, skip: int | None = None) -> Array:
    y = np.take(x, index, axis=0)  # NumPy copies rows at the speed of memory
    if skip is not None:
        y[index == skip] = 0
    return y


@jit
def add_rows_loop(
    x: Array, order: Array, targets: Array, starts: Array, ends: Array, y: Array, start: int, stop: int
) -> None:
    """y[targets[i]] += sum of x[order[k]] over starts[i] <= k < ends[i]; long sums wide, rounded once."""
    columns = x.shape[1]
    total = np.empty(columns, np.float64)
    for i in range(start, stop):
        y_row = y[targets[i]]
        if ends[i] == starts[i] + 1:
            row = x[order[starts[i]]]
            for j in range(columns):
                y_row[j] += row[j]
        else:
            for j in range(columns):
                total[j] = 0
            for k in range(starts[i], ends[i]):
                row = x[order[k]]
                for j in range(columns):
                    total[j] += row[j]
            for j in range(columns):  # added last, as the formula does: the order counts where arrays are float64
                y_row[j] = y_row[j] + total[j]


@takes_bfloat16
def scatter_rows(
    x: Array, index: Array, *, num_rows: int, skip: int | None = None, into: Sequence[Array | None] = (None,)
) -> Array:
    shape = (num_rows, *x.shape[1:])
    if into[0] is None:
        y = np.zeros(shape, x.dtype)  # all at once: the system's memset goes past the caches
    else:
        y = into[0]
        y[...] = 0
    return _add_rows_into(y, x, index, skip)


@takes_bfloat16
def add_rows(total: Array, x: Array, index: Array, *, skip: int | None = None) -> Array:
    return _add_rows_into(total, x, index, skip)


def _add_rows_into(y: Array, x: Array, index: Array, skip: int | None) -> Array:
    num_rows = len(y)
    numbers = row_numbers(index, num_rows, "index")
    rows = contiguous(x, (len(numbers), *y.shape[1:]), "the rows to add").reshape(len(numbers), prod(x.shape[1:]))
    order = np.argsort(numbers, kind="stable")
    counts = np.bincount(numbers, minlength=num_rows)
    ends = np.cumsum(counts)
    targets = np.flatnonzero(counts)
    if skip is not None:
        targets = targets[targets != skip]
    table = np.ascontiguousarray(y).reshape(num_rows, rows.shape[1])
    narrow = table if is_bfloat16(table) else None
    if narrow is not None:  # the rows that are added to go to float32 and back, the others not
        rows, table = widened(rows), widened(narrow[targets])
    places = targets if narrow is None else np.arange(len(targets))
    grain = rows_worth_a_thread(rows.shape[1] * max(1, len(numbers) // max(1, len(targets))), COST)
    starts, ends = (ends - counts)[targets], ends[targets]
    run_rows(add_rows_loop, len(targets), rows, order, places, starts, ends, table, grain=grain)
    if narrow is not None:
        narrow[targets] = narrowed(table, narrow.dtype)
        table = narrow
    if not np.shares_memory(table, y):
        y[...] = table.reshape(y.shape)  # its rows are not one after the other
    return y
