"""Products by NumPy's BLAS; bias and GELU in one pass over the product while much of it is in cache."""

from __future__ import annotations

import numpy as np

from minibert.kernels.activation.cpu import gelu_erf_loop, gelu_tanh_loop
from minibert.kernels.cpu_arrays import contiguous
from minibert.kernels.cpu_threads import jit, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array, library
from minibert.kernels.reduction.cpu import reduce_sum


@jit
def bias_rows(y: Array, bias: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        row = y[i]
        for j in range(row.size):
            row[j] += bias[j]


@jit
def bias_gelu_rows(before: Array, bias: Array, y: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        bias_rows(before, bias, i, i + 1)
        gelu_erf_loop(before[i], y[i], 0, bias.size)


@jit
def bias_gelu_tanh_rows(before: Array, bias: Array, y: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        bias_rows(before, bias, i, i + 1)
        gelu_tanh_loop(before[i], y[i], 0, bias.size)


def blas_ready(x: Array) -> Array:
    """`x`, copied where BLAS cannot read it (neither of its last two axes is contiguous): NumPy's own loop is slow."""
    if x.ndim < 2:
        return x
    (rows, columns), (down, across) = x.shape[-2:], x.strides[-2:]
    item = x.itemsize
    by_rows = across == item and down % item == 0 and down >= columns * item
    by_columns = down == item and across % item == 0 and across >= rows * item
    return x if by_rows or by_columns else np.ascontiguousarray(x)


def product_with_transpose(x: Array, weight: Array) -> Array:
    """x W' for x (..., in) and W (out, in), row after row: matmul keeps the order of x's axes, whatever it is."""
    return np.ascontiguousarray(np.matmul(blas_ready(x), blas_ready(weight).T))


@library
def matmul(a: Array, b: Array) -> Array:
    return np.matmul(blas_ready(a), blas_ready(b))


def linear(x: Array, weight: Array, bias: Array) -> Array:
    bias = contiguous(bias, weight.shape[:1], "bias")
    y = product_with_transpose(x, weight)
    rows = y.reshape(-1, max(1, bias.size))
    run_rows(bias_rows, len(rows), rows, bias, grain=rows_worth_a_thread(bias.size, cost=0.25))
    return y


def linear_grad(g: Array, x: Array) -> tuple[Array, Array]:
    return np.matmul(blas_ready(g).T, blas_ready(x)), reduce_sum(g, axis=0)


def linear_gelu(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    bias = contiguous(bias, weight.shape[:1], "bias")
    before = product_with_transpose(x, weight)
    y = np.empty_like(before)
    rows = before.reshape(-1, max(1, bias.size))
    kernel = bias_gelu_tanh_rows if approximate == "tanh" else bias_gelu_rows
    run_rows(kernel, len(rows), rows, bias, y.reshape(rows.shape), grain=rows_worth_a_thread(bias.size))
    return y, before
