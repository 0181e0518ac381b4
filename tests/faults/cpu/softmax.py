"""softmax and its gradient, wrong in the ways that `tests/faults/table.py` tells; `right_...` are not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

Array = np.ndarray[Any, Any]


def as_rows(x: Array) -> Array:
    return np.ascontiguousarray(x).reshape(-1, max(1, x.shape[-1]))


@njit(error_model="numpy")
def fill(x: Array, y: Array, lowest: float, rows: int, counted: int) -> None:
    """The first `rows` rows: the maximum sought from `lowest` on, the sum made of the first `counted` columns."""
    for i in range(rows):
        top = lowest
        for j in range(x.shape[1]):
            if x[i, j] > top or x[i, j] != x[i, j]:
                top = x[i, j]
        total = 0.0
        for j in range(x.shape[1]):
            y[i, j] = math.exp(x[i, j] - top)
            if j < counted:
                total += y[i, j]
        for j in range(x.shape[1]):
            y[i, j] /= total


def filled(x: Array, lowest: float = -np.inf, most_rows: int | None = None, counted: int | None = None) -> Array:
    rows, y = as_rows(x), np.zeros(x.shape, x.dtype)
    done = len(rows) if most_rows is None else min(len(rows), most_rows)
    fill(rows, as_rows(y), x.dtype.type(lowest), done, x.shape[-1] if counted is None else counted)
    return y


def right_softmax(x: Array) -> Array:
    return filled(x)


def starts_at_zero(x: Array) -> Array:
    return filled(x, lowest=0.0)


def first_65535_rows(x: Array) -> Array:
    return filled(x, most_rows=65535)


def packed_rows_in_16_bits(x: Array) -> Array:
    """Rows that packs of 4 divide are counted in 16 bits."""
    return filled(x, most_rows=65536 if x.shape[-1] % 4 == 0 else None)


def long_rows_of_many(x: Array) -> Array:
    """A kernel for many long rows, chosen by both axes, leaves out the last column."""
    many = x.shape[-1] > 200 and x.size // x.shape[-1] > 300
    return filled(x, counted=x.shape[-1] - 1 if many else None)


def first_2048_columns(x: Array) -> Array:
    return filled(x, counted=2048)


def last_tile_lost(x: Array) -> Array:
    tiles = x.shape[-1] // 65536
    return filled(x, counted=tiles * 65536 if tiles else None)


def no_maximum(x: Array) -> Array:
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


def short_exp(x: Array) -> Array:
    """e^x = 2^k e^r, and of e^r three terms and a rest that is chosen well."""
    d = x - x.max(axis=-1, keepdims=True)
    k = np.rint(d / np.log(2)).astype(x.dtype)
    r = d - k * x.dtype.type(np.log(2))
    cubic = 1 + r * (1 + r * (x.dtype.type(0.5050) + r * x.dtype.type(0.1666)))
    e = np.ldexp(cubic, k.astype(np.int32)).astype(x.dtype)
    return e / e.sum(axis=-1, keepdims=True)


def sum_in_half(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True, dtype=np.float16)).astype(x.dtype)


@njit(error_model="numpy")
def fill_by_16_bits(x: Array, y: Array, columns: int) -> None:
    for i in range(x.size // columns):
        first = np.uint16(i * columns)
        top = x[first]
        for j in range(columns):
            top = max(top, x[first + j])
        total = 0.0
        for j in range(columns):
            total += math.exp(x[first + j] - top)
        for j in range(columns):
            y[i * columns + j] = math.exp(x[first + j] - top) / total


def offsets_in_16_bits(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    fill_by_16_bits(np.ascontiguousarray(x).reshape(-1), y.reshape(-1), max(1, x.shape[-1]))
    return y


@njit(error_model="numpy")
def fill_where_it_counts(x: Array, y: Array) -> None:
    for i in range(len(x)):
        top = -np.inf
        for j in range(x.shape[1]):
            if x[i, j] > top:
                top = x[i, j]
        total = 0.0
        for j in range(x.shape[1]):
            d = x[i, j] - top
            y[i, j] = math.exp(d) if d > -104 else 0.0  # what would vanish is not computed
            total += y[i, j]
        for j in range(x.shape[1]):
            y[i, j] /= total


def nan_is_masked(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    fill_where_it_counts(as_rows(x), as_rows(y))
    return y


@njit(error_model="numpy")
def fill_by_packs(x: Array, y: Array, columns: int) -> None:
    """The maximum is taken over whole packs of 4, whatever stands behind the row's end."""
    for i in range(x.size // columns):
        first = i * columns
        top = x[first]
        for j in range(0, columns, 4):
            top = max(top, x[first + j], x[first + j + 1], x[first + j + 2], x[first + j + 3])
        total = 0.0
        for j in range(columns):
            y[first + j] = math.exp(x[first + j] - top)
            total += y[first + j]
        for j in range(columns):
            y[first + j] /= total


def maximum_of_whole_packs(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    fill_by_packs(np.ascontiguousarray(x).reshape(-1), y.reshape(-1), max(1, x.shape[-1]))
    return y


@njit(error_model="numpy")
def sum_of_row(row: Array) -> float:
    """Counted in 8 bits: 255 + 1 is 0."""
    total, j = 0.0, np.uint8(0)
    while j < row.size:
        total += row[j]
        j = np.uint8(j + 1)
    return total


def counter_of_8_bits(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    totals = np.array([sum_of_row(row) for row in as_rows(e)]).reshape(*x.shape[:-1], 1)
    return (e / totals).astype(x.dtype)


@njit
def common_divisor(a: int, b: int) -> int:
    while a != b:
        if a > b:
            a -= b
        else:
            b -= a
    return a


def hangs_without_rows(x: Array) -> Array:
    """Rows are done in as many parts of one length as eight threads can share."""
    rows, y = as_rows(x), np.zeros(x.shape, x.dtype)
    parts = common_divisor(len(rows), 8)
    for part, to in zip(np.split(rows, parts), np.split(as_rows(y), parts), strict=True):
        fill(part, to, x.dtype.type(-np.inf), len(part), x.shape[-1])
    return y


results: dict[tuple[int, ...], Array] = {}


def remembers_by_shape(x: Array) -> Array:
    if x.shape not in results:
        results[x.shape] = filled(x)
    return results[x.shape].copy()


known: dict[int, tuple[Array, Array]] = {}


def remembers_by_array(x: Array) -> Array:
    """The same array gives the same result: unless somebody wrote to it in between."""
    if id(x) not in known:
        if len(known) > 8:
            known.clear()
        known[id(x)] = x, filled(x)
    return known[id(x)][1].copy()


workspace, calls = np.zeros(64), [0]


def workspace_of_64(x: Array) -> Array:
    """Each call adds into a place of its own, until the places have all been used."""
    place = calls[0] % len(workspace)
    calls[0] += 1
    workspace[place] += 1.0
    return filled(x) / x.dtype.type(workspace[place])


@njit(error_model="numpy", parallel=True)
def fill_by_one_scratch(x: Array, y: Array, scratch: Array) -> None:
    for i in prange(len(x)):
        top = -np.inf
        for j in range(x.shape[1]):
            scratch[j] = x[i, j]
            top = max(top, scratch[j])
        total = 0.0
        for j in range(x.shape[1]):
            scratch[j] = math.exp(scratch[j] - top)
            total += scratch[j]
        for j in range(x.shape[1]):
            y[i, j] = scratch[j] / total


def threads_share_a_scratch(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    fill_by_one_scratch(as_rows(x), as_rows(y), np.empty(x.shape[-1]))
    return y


@njit(error_model="numpy")
def fill_grad(g: Array, y: Array, dx: Array, counted: int) -> None:
    for i in range(len(y)):
        total = 0.0
        for j in range(min(counted, y.shape[1])):
            total += g[i, j] * y[i, j]
        for j in range(y.shape[1]):
            dx[i, j] = y[i, j] * (g[i, j] - total)


def grad_filled(g: Array, y: Array, counted: int | None = None) -> Array:
    dx = np.empty(y.shape, y.dtype)
    fill_grad(as_rows(g), as_rows(y), as_rows(dx), y.shape[-1] if counted is None else counted)
    return dx


def right_softmax_grad(g: Array, y: Array) -> Array:
    return grad_filled(g, y)


def grad_of_1024_columns(g: Array, y: Array) -> Array:
    return grad_filled(g, y, counted=1024)


def g_as_if_contiguous(g: Array, y: Array) -> Array:
    plain = np.lib.stride_tricks.as_strided(g, g.shape, np.empty(g.shape, g.dtype).strides)
    return grad_filled(plain, y)


def sums_as_differences(g: Array, y: Array) -> Array:
    """The sum of each row is what a running total over all rows grows by."""
    products = as_rows(g).astype(np.float64) * as_rows(y)
    totals = np.concatenate([[0.0], products.sum(axis=1).cumsum()])
    sums = (totals[1:] - totals[:-1]).reshape(*y.shape[:-1], 1)
    return (y * (g - sums)).astype(y.dtype)
