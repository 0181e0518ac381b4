"""Products by NumPy's BLAS; bias and GELU in one pass over the product while much of it is in cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minibert.kernels.activation.cpu import gelu_erf_loop, gelu_tanh_loop
from minibert.kernels.cpu_arrays import contiguous
from minibert.kernels.cpu_blas import blas_ready, product
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


def product_with_transpose(x: Array, weight: Array) -> Array:
    """x W' for x (..., in) and W (out, in), row after row whatever the order of x's axes."""
    rows = x if x.ndim == 2 else np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    return product(rows, weight.swapaxes(0, 1)).reshape(*x.shape[:-1], len(weight))


@library
def matmul(a: Array, b: Array) -> Array:
    return product(a, b) if a.ndim == b.ndim == 2 else np.matmul(blas_ready(a), blas_ready(b))


def linear(x: Array, weight: Array, bias: Array) -> Array:
    bias = contiguous(bias, weight.shape[:1], "bias")
    y = product_with_transpose(x, weight)
    rows = y.reshape(-1, max(1, bias.size))
    run_rows(bias_rows, len(rows), rows, bias, grain=rows_worth_a_thread(bias.size, cost=0.25))
    return y


def linear_grad(g: Array, x: Array, *, into: Sequence[Array | None] = (None,)) -> tuple[Array, Array]:
    return product(g.swapaxes(0, 1), x, into[0]), reduce_sum(g, axis=0)


def linear_gelu(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    bias = contiguous(bias, weight.shape[:1], "bias")
    before = product_with_transpose(x, weight)
    y = np.empty_like(before)
    rows = before.reshape(-1, max(1, bias.size))
    kernel = bias_gelu_tanh_rows if approximate == "tanh" else bias_gelu_rows
    run_rows(kernel, len(rows), rows, bias, y.reshape(rows.shape), grain=rows_worth_a_thread(bias.size))
    return y, before
