"""embedding and gather_rows read rows of tables; scatter_rows adds rows into them.

scatter_rows sorts the rows by where they go, so that each output row is the sum of one run, made by one thread: no
atomics, the same order each time.
"""

from __future__ import annotations

import numpy as np

from minibert.kernels.cpu_arrays import contiguous, row_numbers
from minibert.kernels.cpu_threads import jit, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array

COST = 0.5  # nanoseconds an element, for `rows_worth_a_thread`
NO_ROW = -1


@jit
def embedding_rows(word, position, token_type, ids, positions, types, y, start, stop):  # type: ignore[no-untyped-def]
    for n in range(start, stop):
        word_row, position_row, type_row = word[ids[n]], position[positions[n]], token_type[types[n]]
        y_row = y[n]
        for j in range(y_row.size):
            y_row[j] = word_row[j] + position_row[j] + type_row[j]


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
    tables = (
        np.ascontiguousarray(word),
        contiguous(position, (len(position), columns), "position"),
        contiguous(token_type, (len(token_type), columns), "token_type"),
    )
    y = np.empty((*input_ids.shape, columns), word.dtype)
    rows = y.reshape(-1, columns)
    run_rows(embedding_rows, len(rows), *tables, *ids, rows, grain=rows_worth_a_thread(columns, COST))
    return y


@jit
def gather_rows_loop(x, index, skip, y, start, stop):  # type: ignore[no-untyped-def]
    for k in range(start, stop):
        if index[k] == skip:
            y[k] = 0
        else:
            y[k] = x[index[k]]


def gather_rows(x: Array, index: Array, *, skip: int | None = None) -> Array:
    rows, columns = x.shape
    numbers = row_numbers(index, rows, "index")
    y = np.empty((len(numbers), columns), x.dtype)
    grain = rows_worth_a_thread(columns, COST)
    skipped = NO_ROW if skip is None else skip
    run_rows(gather_rows_loop, len(numbers), np.ascontiguousarray(x), numbers, skipped, y, grain=grain)
    return y


@jit
def scatter_rows_loop(x, order, starts, y, start, stop):  # type: ignore[no-untyped-def]
    """y[i] = sum of x[order[k]] over starts[i] <= k < starts[i + 1]; long sums wide, rounded once."""
    total = np.empty(x.shape[1], np.float64)
    for i in range(start, stop):
        first, last = starts[i], starts[i + 1]
        if last == first:
            y[i] = 0
        elif last == first + 1:
            y[i] = x[order[first]]
        else:
            total[:] = 0
            for k in range(first, last):
                row = x[order[k]]
                for j in range(row.size):
                    total[j] += row[j]
            y[i] = total


def scatter_rows(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    numbers = row_numbers(index, num_rows, "index")
    x = contiguous(x, (len(numbers), *x.shape[1:]), "the rows to scatter")
    rows = x.reshape(len(numbers), int(np.prod(x.shape[1:])))
    order = np.argsort(numbers, kind="stable")
    counts = np.bincount(numbers, minlength=num_rows)
    starts = np.concatenate([[0], np.cumsum(counts)])
    if skip is not None and 0 <= skip < num_rows:
        order = np.delete(order, slice(starts[skip], starts[skip + 1]))
        starts[skip + 1 :] -= counts[skip]
    y = np.empty((num_rows, rows.shape[1]), x.dtype)
    run_rows(scatter_rows_loop, num_rows, rows, order, starts, y, grain=rows_worth_a_thread(rows.shape[1], COST))
    return y.reshape(num_rows, *x.shape[1:])
