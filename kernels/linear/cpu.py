"""Products by NumPy's BLAS; bias and GELU in one pass over the product while much of it is in cache."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np

from minibert.kernels.activation import CUBIC
from minibert.kernels.cpu_math import constant, erf, tanh
from minibert.kernels.cpu_threads import jit, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array


@jit
def bias_rows(y: Array, bias: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        row = y[i]
        for j in range(row.size):
            row[j] += bias[j]


@jit
def bias_gelu_rows(before: Array, bias: Array, y: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        row, out = before[i], y[i]
        for j in range(row.size):
            x = row[j] + bias[j]
            row[j] = x
            out[j] = x * constant(0.5, x) * (constant(1.0, x) + erf(x * constant(sqrt(0.5), x)))


@jit
def bias_gelu_tanh_rows(before: Array, bias: Array, y: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        row, out = before[i], y[i]
        for j in range(row.size):
            x = row[j] + bias[j]
            row[j] = x
            inner = constant(sqrt(2 / pi), x) * (x + constant(CUBIC, x) * (x * x * x))
            out[j] = x * constant(0.5, x) * (constant(1.0, x) + tanh(inner))


def blas_ready(x: Array) -> Array:
    """`x`, copied where neither of its last two axes is contiguous: BLAS cannot read it, and NumPy's own loop is slow."""
    if x.ndim < 2:
        return x
    (rows, columns), (down, across) = x.shape[-2:], x.strides[-2:]
    item = x.itemsize
    by_rows = across == item and down % item == 0 and down >= columns * item
    by_columns = down == item and across % item == 0 and across >= rows * item
    return x if by_rows or by_columns else np.ascontiguousarray(x)


def product_with_transpose(x: Array, weight: Array) -> Array:
    """x W' for x (..., in) and W (out, in)."""
    return np.matmul(blas_ready(x), blas_ready(weight).T)


def matmul(a: Array, b: Array) -> Array:
    return np.matmul(blas_ready(a), blas_ready(b))


matmul.by = "library"  # type: ignore[attr-defined]


def _checked_bias(weight: Array, bias: Array) -> Array:
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"weight {weight.shape} needs a bias ({weight.shape[0]},), got {bias.shape}")
    return np.ascontiguousarray(bias)


def linear(x: Array, weight: Array, bias: Array) -> Array:
    bias = _checked_bias(weight, bias)
    y = product_with_transpose(x, weight)
    rows = y.reshape(-1, bias.size)
    run_rows(bias_rows, len(rows), rows, bias, grain=rows_worth_a_thread(bias.size, cost=0.25))
    return y


def linear_gelu(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    bias = _checked_bias(weight, bias)
    before = product_with_transpose(x, weight)
    y = np.empty_like(before)
    rows = before.reshape(-1, bias.size)
    kernel = bias_gelu_tanh_rows if approximate == "tanh" else bias_gelu_rows
    run_rows(kernel, len(rows), rows, bias, y.reshape(rows.shape), grain=rows_worth_a_thread(bias.size))
    return y, before
