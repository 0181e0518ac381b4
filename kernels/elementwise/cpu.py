"""add, mul, scale, where on arrays of one shape, or with a single number; other layouts are NumPy's to broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.kernels.cpu_arrays import flat
from minibert.kernels.cpu_threads import jit, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array

LIGHT = rows_worth_a_thread(1, cost=0.25)  # elements


@jit
def add_loop(a, b, y, start, stop):  # type: ignore[no-untyped-def]
    a, b, y = a[start:stop], b[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] + b[i]


@jit
def mul_loop(a, b, y, start, stop):  # type: ignore[no-untyped-def]
    a, b, y = a[start:stop], b[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] * b[i]


@jit
def scale_loop(a, factor, y, start, stop):  # type: ignore[no-untyped-def]
    a, y = a[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] * factor


@jit
def where_loop(condition, a, b, y, start, stop):  # type: ignore[no-untyped-def]
    condition, a, b, y = condition[start:stop], a[start:stop], b[start:stop], y[start:stop]
    for i in range(y.size):
        y[i] = a[i] if condition[i] else b[i]


def _elementwise(loop: Any, *arrays: Array) -> Array:
    y = np.empty(arrays[-1].shape, arrays[-1].dtype)
    run_rows(loop, y.size, *flat(*arrays), y.reshape(-1), grain=LIGHT)
    return y


def add(a: Array, b: Array) -> Array:
    return _elementwise(add_loop, a, b) if a.shape == b.shape else np.add(a, b)


def mul(a: Array, b: Array) -> Array:
    return _elementwise(mul_loop, a, b) if a.shape == b.shape else np.multiply(a, b)


def scale(a: Array, *, factor: float) -> Array:
    y = np.empty(a.shape, a.dtype)
    (vector,) = flat(a)
    run_rows(scale_loop, a.size, vector, a.dtype.type(factor), y.reshape(-1), grain=LIGHT)
    return y


def where(condition: Array, a: Array, b: Array) -> Array:
    if condition.shape == a.shape == b.shape:
        return _elementwise(where_loop, condition, a, b)
    return np.where(condition, a, b)
