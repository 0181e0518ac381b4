"""layer_norm and add_layer_norm with their gradients: one row at a time, all of it in the first-level cache.

The gradients of weight and bias are sums over rows: each block of rows has its own, added up in order, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minibert.kernels.cpu.arrays import contiguous
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import philox_row
from minibert.kernels.cpu.threads import blocks, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array
from minibert.kernels.philox import NO_STREAM, Stream, numbers_of, threshold

BLOCK = 32  # rows whose gradients are added in the precision of the arrays
COST, GRAD_COST = 0.15, 0.35  # nanoseconds an element, for `rows_worth_a_thread`
DROPOUT_COST = 0.45  # more


@jit
def normalise(x: Array, weight: Array, bias: Array, eps: Any, y: Array) -> tuple[Any, Any]:
    """One row: y = (x - mean) rstd w + b. The mean first, then the variance about it: offsets do no harm."""
    n = x.dtype.type(x.size)
    total = x.dtype.type(0)
    for j in range(x.size):
        total += x[j]
    mean = total / n
    squares = x.dtype.type(0)
    for j in range(x.size):
        squares += (x[j] - mean) * (x[j] - mean)
    rstd = x.dtype.type(1) / math.sqrt(squares / n + eps)
    for j in range(x.size):
        y[j] = (x[j] - mean) * rstd * weight[j] + bias[j]
    return mean, rstd


@jit
def layer_norm_rows(
    x: Array, weight: Array, bias: Array, eps: Any, y: Array, mean: Array, rstd: Array, start: int, stop: int
) -> None:
    for i in range(start, stop):
        mean[i], rstd[i] = normalise(x[i], weight, bias, eps, y[i])


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> tuple[Array, ...]:
    rows, columns = x.shape
    y, mean, rstd = np.empty(x.shape, x.dtype), np.empty(rows, x.dtype), np.empty(rows, x.dtype)
    inputs = (
        np.ascontiguousarray(x),
        contiguous(weight, (columns,), "weight"),
        contiguous(bias, (columns,), "bias"),
    )
    grain = rows_worth_a_thread(columns, COST)
    run_rows(layer_norm_rows, rows, *inputs, x.dtype.type(eps), y, mean, rstd, grain=grain)
    return y, mean, rstd


@jit
def add_layer_norm_rows(
    x: Array, residual: Array, weight: Array, bias: Array, eps: Any, limit: Any, scale: Any, stream: tuple[int, ...],
    y: Array, z: Array, mean: Array, rstd: Array, start: int, stop: int,
) -> None:  # fmt: skip
    n = x.shape[1]
    words = np.empty(n, np.uint32)
    zero = x.dtype.type(0)
    for i in range(start, stop):
        x_row, residual_row, z_row = x[i], residual[i], z[i]
        if limit > 0:
            philox_row(words, i * n, n, *stream)
            for j in range(n):  # chosen before it is scaled: see `jit`
                z_row[j] = (x_row[j] if words[j] >= limit else zero) * scale + residual_row[j]
        else:
            for j in range(n):
                z_row[j] = x_row[j] * scale + residual_row[j]
        mean[i], rstd[i] = normalise(z_row, weight, bias, eps, y[i])


def add_layer_norm(
    x: Array, residual: Array, weight: Array, bias: Array,
    *, eps: float = 1e-12, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> tuple[Array, ...]:  # fmt: skip
    rows, columns = x.shape
    y, z = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    mean, rstd = np.empty(rows, x.dtype), np.empty(rows, x.dtype)
    inputs = (
        np.ascontiguousarray(x),
        contiguous(residual, x.shape, "residual"),
        contiguous(weight, (columns,), "weight"),
        contiguous(bias, (columns,), "bias"),
    )
    run_rows(
        add_layer_norm_rows, rows, *inputs, x.dtype.type(eps), *_dropout(rate, x.dtype),
        numbers_of(stream), y, z, mean, rstd,
        grain=rows_worth_a_thread(columns, COST + DROPOUT_COST if rate else COST),
    )  # fmt: skip
    return y, z, mean, rstd


def _dropout(rate: float, dtype: Any) -> tuple[Any, Any]:
    """The word below which an element is dropped (0: none is), and the factor of those kept."""
    return np.uint32(threshold(rate)), dtype.type(1 / (1 - rate))


@jit
def normalise_grad(
    g: Array, x: Array, weight: Array, mean: Any, rstd: Any, dx: Array, dweight: Array, dbias: Array
) -> None:
    """One row: dx = (h - mean h - n mean(h n)) rstd with h = g w, n = (x - mean) rstd; dw += g n, db += g."""
    sum_h, sum_hn = x.dtype.type(0), x.dtype.type(0)
    for j in range(x.size):
        n = (x[j] - mean) * rstd
        h = g[j] * weight[j]
        sum_h += h
        sum_hn += h * n
    mean_h, mean_hn = sum_h / x.dtype.type(x.size), sum_hn / x.dtype.type(x.size)
    for j in range(x.size):
        n = (x[j] - mean) * rstd
        dx[j] = (g[j] * weight[j] - mean_h - n * mean_hn) * rstd
    for j in range(x.size):  # not in the loop that sums: see `jit`
        dweight[j] += g[j] * (x[j] - mean) * rstd
        dbias[j] += g[j]


@jit
def layer_norm_grad_blocks(
    g: Array, x: Array, weight: Array, mean: Array, rstd: Array, dx: Array, dweight: Array, dbias: Array,
    start: int, stop: int,
) -> None:  # fmt: skip
    for block in range(start, stop):
        dweight_block, dbias_block = dweight[block], dbias[block]
        for j in range(x.shape[1]):
            dweight_block[j], dbias_block[j] = 0, 0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[0])):
            normalise_grad(g[i], x[i], weight, mean[i], rstd[i], dx[i], dweight_block, dbias_block)


@jit
def add_layer_norm_grad_blocks(
    g: Array, z: Array, weight: Array, mean: Any, rstd: Any, limit: Any, scale: Any, stream: tuple[int, ...],
    dx: Array, dz: Array, dweight: Array, dbias: Array, start: int, stop: int,
) -> None:  # fmt: skip
    n = z.shape[1]
    words = np.empty(n, np.uint32)
    zero = z.dtype.type(0)
    for block in range(start, stop):
        dweight_block, dbias_block = dweight[block], dbias[block]
        for j in range(n):
            dweight_block[j], dbias_block[j] = 0, 0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, z.shape[0])):
            dx_row, dz_row = dx[i], dz[i]
            normalise_grad(g[i], z[i], weight, mean[i], rstd[i], dz_row, dweight_block, dbias_block)
            philox_row(words, i * n, n, *stream)
            for j in range(n):
                dx_row[j] = dz_row[j] * scale if words[j] >= limit else zero


def _sum_blocks(partial: Array) -> Array:
    """(blocks, C) -> (C,): in order, in float64, rounded once."""
    return partial.sum(axis=0, dtype=np.float64).astype(partial.dtype)


def _grad_inputs(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    rows, columns = x.shape
    return (
        contiguous(g, x.shape, "the gradient"),
        np.ascontiguousarray(x),
        contiguous(weight, (columns,), "weight"),
        contiguous(mean, (rows,), "mean"),
        contiguous(rstd, (rows,), "rstd"),
    )


def layer_norm_grad(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    inputs = _grad_inputs(g, x, weight, mean, rstd)
    rows, columns = x.shape
    count = blocks(rows, BLOCK)
    dx = np.empty(x.shape, x.dtype)
    dweight, dbias = np.empty((count, columns), x.dtype), np.empty((count, columns), x.dtype)
    grain = rows_worth_a_thread(BLOCK * columns, GRAD_COST)
    run_rows(layer_norm_grad_blocks, count, *inputs, dx, dweight, dbias, grain=grain)
    return dx, _sum_blocks(dweight), _sum_blocks(dbias)


def add_layer_norm_grad(
    g: Array, z: Array, weight: Array, mean: Array, rstd: Array, *, rate: float = 0.0, stream: Stream = NO_STREAM
) -> tuple[Array, ...]:
    dropped = _dropout(rate, z.dtype)
    if rate == 0:
        dz, dweight, dbias = layer_norm_grad(g, z, weight, mean, rstd)
        return dz, dz, dweight, dbias
    inputs = _grad_inputs(g, z, weight, mean, rstd)
    rows, columns = z.shape
    count = blocks(rows, BLOCK)
    dx, dz = np.empty(z.shape, z.dtype), np.empty(z.shape, z.dtype)
    dweight, dbias = np.empty((count, columns), z.dtype), np.empty((count, columns), z.dtype)
    run_rows(
        add_layer_norm_grad_blocks, count, *inputs, *dropped, numbers_of(stream), dx, dz, dweight, dbias,
        grain=rows_worth_a_thread(BLOCK * columns, GRAD_COST + DROPOUT_COST),
    )  # fmt: skip
    return dx, dz, _sum_blocks(dweight), _sum_blocks(dbias)
