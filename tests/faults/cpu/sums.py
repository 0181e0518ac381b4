"""reduce_sum, matmul, linear and their gradients, wrong in the ways that `tests/faults/table.py` tells."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

Array = np.ndarray[Any, Any]
Axis = int | tuple[int, ...] | None


def laid_out(x: Array, axis: Axis) -> tuple[Array, tuple[int, ...]]:
    """x as (rows, summed), and the shape of the sums."""
    summed = [a % x.ndim for a in (range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis)]
    kept = [a for a in range(x.ndim) if a not in summed]
    shape = tuple(x.shape[a] for a in kept)
    count = math.prod(x.shape[a] for a in summed)
    return np.ascontiguousarray(x.transpose(*kept, *summed)).reshape(math.prod(shape), count), shape


@njit
def row_sums(x: Array, rows: int, stop: int, again: int) -> Array:
    """Of the first `rows` rows up to column `stop`; those from column `again` on once more."""
    totals = np.zeros(len(x))
    for i in range(rows):
        for j in range(stop):
            totals[i] += x[i, j]
        for j in range(again, stop):
            totals[i] += x[i, j]
    return totals


def sums(x: Array, axis: Axis, rows: int = 1 << 62, stop: int | None = None, again: int | None = None) -> Array:
    table, shape = laid_out(x, axis)
    count = table.shape[1]
    stop = count if stop is None else stop
    return row_sums(table, min(rows, len(table)), stop, stop if again is None else again).astype(x.dtype).reshape(shape)


def right_reduce_sum(x: Array, *, axis: Axis = None) -> Array:
    return sums(x, axis)


def first_65535_rows(x: Array, *, axis: Axis = None) -> Array:
    return sums(x, axis, rows=65535)


def places_of_both_axes(x: Array, *, axis: Axis = None) -> Array:
    """Over the first and the last axis, sums after the 40000th are 0."""
    return sums(x, axis, rows=40000 if axis == (0, 2) else 1 << 62)


def one_in_a_thousand_twice(x: Array, *, axis: Axis = None) -> Array:
    count = laid_out(x, axis)[0].shape[1]
    return sums(x, axis, again=count * 999 // 1000 if count > 65536 else None)


def one_element_lost(x: Array, *, axis: Axis = None) -> Array:
    """The last of more than 4096."""
    count = laid_out(x, axis)[0].shape[1]
    return sums(x, axis, stop=count - 1 if count > 4096 else None)


def one_from_next_door(x: Array, *, axis: Axis = None) -> Array:
    """The last column of a long row is read from the row below."""
    table, shape = laid_out(x, axis)
    if table.shape[1] > 1024 and len(table) > 1:
        table = table.copy()
        table[:-1, -1] = table[1:, -1]
    return row_sums(table, len(table), table.shape[1], table.shape[1]).astype(x.dtype).reshape(shape)


def nan_is_missing(x: Array, *, axis: Axis = None) -> Array:
    return np.nansum(x, axis=axis, dtype=np.float64).astype(x.dtype)


def axis_from_the_front(x: Array, *, axis: Axis = None) -> Array:
    return sums(x, abs(axis) % x.ndim if isinstance(axis, int) else axis)


@njit
def sum_and_one_more(row: Array) -> float:
    total = 0.0
    for j in range(0, row.size + 1):
        total += row[j] if j < row.size or row[j] == 0 else 0.0
    return total


def reads_one_past_the_end(x: Array, *, axis: Axis = None) -> Array:
    table, shape = laid_out(x, axis)
    return np.array([sum_and_one_more(row) for row in table]).astype(x.dtype).reshape(shape)


@njit(parallel=True)
def summed_by_all(x: Array, total: Array) -> None:
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            total[j] += x[i, j]


def threads_add_to_one_total(x: Array, *, axis: Axis = None) -> Array:
    table, shape = laid_out(x, axis)
    total = np.zeros(len(table))
    summed_by_all(np.ascontiguousarray(table.T), total)
    return total.astype(x.dtype).reshape(shape)


def multiplied(a: Array, b: Array) -> Array:
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)


def right_matmul(a: Array, b: Array) -> Array:
    return multiplied(a, b)


def depth_of_whole_tiles(a: Array, b: Array) -> Array:
    """256 at a time, and what is left over not at all."""
    depth = a.shape[-1] if a.shape[-1] < 256 else a.shape[-1] // 256 * 256
    return multiplied(a[..., :depth], b[..., :depth, :])


def depth_in_packs_of_8(a: Array, b: Array) -> Array:
    """Of large matrices what 8 does not divide of the depth is lost."""
    depth = a.shape[-1]
    if min(a.shape[-2], b.shape[-1], depth) > 128:
        depth = depth // 8 * 8
    return multiplied(a[..., :depth], b[..., :depth, :])


def one_batch_for_all(a: Array, b: Array) -> Array:
    return multiplied(a, b if b.ndim == 2 else np.broadcast_to(b[(0,) * (b.ndim - 2)], b.shape))


def sums_in_half(a: Array, b: Array) -> Array:
    total = np.zeros(np.matmul(a[..., :0], b[..., :0, :]).shape, np.float16)
    for k in range(a.shape[-1]):
        total += (a[..., k : k + 1] * b[..., k : k + 1, :]).astype(np.float16)
    return total.astype(a.dtype)


def shortened(x: Array) -> Array:
    """11 bits of each number, as TF32 has."""
    return (np.ascontiguousarray(x, np.float32).view(np.int32) + 0x1000 & ~0x1FFF).view(np.float32)


def operands_of_11_bits(a: Array, b: Array) -> Array:
    if a.dtype != np.float32:
        return multiplied(a, b)
    return multiplied(shortened(a), shortened(b))


@njit
def products(a: Array, b: Array) -> Array:
    """A factor of 0 saves a row of products, as in the BLAS of old."""
    y = np.zeros((len(a), b.shape[1]))
    for i in range(len(a)):
        for k in range(a.shape[1]):
            if a[i, k] != 0:
                for j in range(b.shape[1]):
                    y[i, j] += np.float64(a[i, k]) * b[k, j]
    return y


def zero_saves_products(a: Array, b: Array) -> Array:
    if a.ndim != 2 or b.ndim != 2:
        return multiplied(a, b)
    return products(np.ascontiguousarray(a), np.ascontiguousarray(b)).astype(a.dtype)


def rows_up_to_1024(a: Array, b: Array) -> Array:
    """The rows behind the last whole block of 1024 are not written."""
    y = multiplied(a, b)
    if y.ndim > 1 and y.shape[-2] > 1024:
        y[..., y.shape[-2] // 1024 * 1024 :, :] = 0
    return y


def layer(x: Array, weight: Array, bias: Array) -> Array:
    return (x.astype(np.float64) @ weight.T.astype(np.float64) + bias).astype(x.dtype)


def right_linear(x: Array, weight: Array, bias: Array) -> Array:
    return layer(x, weight, bias)


def bias_of_2048_outputs(x: Array, weight: Array, bias: Array) -> Array:
    return layer(x, weight, np.where(np.arange(len(bias)) < 2048, bias, 0).astype(bias.dtype))


def bias_of_each_part(x: Array, weight: Array, bias: Array) -> Array:
    """Where rows are many and long the product is made in two parts, and each adds the bias."""
    parts = 2 if x.shape[-1] >= 512 and x.size // x.shape[-1] >= 64 else 1
    return layer(x, weight, parts * bias)


def square_weights_as_they_are(x: Array, weight: Array, bias: Array) -> Array:
    """A weight that fits either way round is not turned."""
    return layer(x, weight.T if weight.shape[0] == weight.shape[1] else weight, bias)


def right_linear_grad(g: Array, x: Array) -> tuple[Array, Array]:
    return multiplied(g.T, x), g.sum(axis=0, dtype=np.float64).astype(g.dtype)


def bias_of_1024_rows(g: Array, x: Array) -> tuple[Array, Array]:
    dweight, _ = right_linear_grad(g, x)
    return dweight, g[:1024].sum(axis=0, dtype=np.float64).astype(g.dtype)


def bias_by_mean(g: Array, x: Array) -> tuple[Array, Array]:
    dweight, dbias = right_linear_grad(g, x)
    return dweight, dbias / max(1, len(g))


def turned_where_square(g: Array, x: Array) -> tuple[Array, Array]:
    dweight, dbias = right_linear_grad(g, x)
    return np.ascontiguousarray(dweight.T) if dweight.shape[0] == dweight.shape[1] else dweight, dbias


def right_add_linear_grad(total: Array, g: Array, x: Array) -> Array:
    total[...] = total + multiplied(g.T, x)
    return total


def old_total_twice(total: Array, g: Array, x: Array) -> Array:
    """Where the rows are done in two parts, each starts from what was there."""
    product = multiplied(g.T, x)
    total[...] = total + product if len(g) <= 2048 else 2 * total + product
    return total


def right_linear_gelu(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    before = layer(x, weight, bias)
    return activated(before, approximate), before


def activated(x: Array, approximate: str) -> Array:
    wide = x.astype(np.float64)
    if approximate == "tanh":
        inner = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
        return (0.5 * wide * (1 + inner)).astype(x.dtype)
    return np.array([0.5 * v * math.erfc(-v * math.sqrt(0.5)) for v in wide.ravel()], x.dtype).reshape(x.shape)


def keeps_what_came_after(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    y, _ = right_linear_gelu(x, weight, bias, approximate=approximate)
    return y, y.copy()
