"""add, mul, scale, where: one loop over the elements each; a number is read once, other operands are laid out first."""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.kernels.cpu.arrays import flat
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.op import Array

GRAIN = rows_worth_a_thread(1, cost=0.12)  # elements
CACHED = 1 << 21  # elements that one core adds as fast as two while they are in its cache, or move from one to another


@jit
def add_loop(a: Array, b: Array, y: Array, start: int, stop: int) -> None:
    a, b, y = a[start:stop], b[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] + b[i]


@jit
def add_number_loop(a: Array, number: Any, y: Array, start: int, stop: int) -> None:
    a, y = a[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] + number


@jit
def mul_loop(a: Array, b: Array, y: Array, start: int, stop: int) -> None:
    a, b, y = a[start:stop], b[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] * b[i]


@jit
def mul_number_loop(a: Array, number: Any, y: Array, start: int, stop: int) -> None:
    a, y = a[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] * number


@jit
def where_loop(condition: Array, a: Array, b: Array, y: Array, start: int, stop: int) -> None:
    condition, a, b, y = condition[start:stop], a[start:stop], b[start:stop], y[start:stop]
    for i in range(y.size):
        yes, no = a[i], b[i]  # both read first: else LLVM gathers, three times slower
        y[i] = yes if condition[i] else no


def _both(loop: Any, number_loop: Any, a: Array, b: Array) -> Array:
    """A commutative op on arrays that broadcast."""
    dtype = a.dtype if a.dtype == b.dtype else np.result_type(a, b)
    if a.size == 1 and a.ndim <= b.ndim:
        a, b = b, a
    if b.size == 1 and b.ndim <= a.ndim and a.shape != b.shape:
        vector = np.ascontiguousarray(a).reshape(-1)
        y = np.empty(vector.shape, dtype)
        run_rows(number_loop, y.size, vector, b.reshape(-1)[0], y, grain=CACHED)
        return y.reshape(a.shape)
    if a.shape != b.shape:
        a, b = np.broadcast_arrays(a, b)
    first, second = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    y = np.empty(first.shape, dtype)
    run_rows(loop, y.size, first, second, y, grain=CACHED)
    return y.reshape(a.shape)


def add(a: Array, b: Array) -> Array:
    return _both(add_loop, add_number_loop, a, b)


def mul(a: Array, b: Array) -> Array:
    return _both(mul_loop, mul_number_loop, a, b)


def scale(a: Array, *, factor: float) -> Array:
    vector = np.ascontiguousarray(a).reshape(-1)
    y = np.empty(vector.shape, np.result_type(a, float(factor)))
    run_rows(mul_number_loop, y.size, vector, y.dtype.type(factor), y, grain=CACHED)
    return y.reshape(a.shape)


def where(condition: Array, a: Array, b: Array) -> Array:
    shape = np.broadcast_shapes(condition.shape, a.shape, b.shape)
    y = np.empty(shape, np.result_type(a, b))
    three = flat(*(np.broadcast_to(x, shape) for x in (condition, a, b)))
    run_rows(where_loop, y.size, *three, y.reshape(-1), grain=GRAIN)
    return y
