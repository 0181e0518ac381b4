"""Pooling of sequences and rows of length 1: a sequence, or a row, at a time. Means are added in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minibert.kernels.cpu.arrays import contiguous
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import vmax
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.op import Array
from minibert.kernels.pooling import EPS

COST = 0.1  # nanoseconds an element, for `rows_worth_a_thread`


@jit
def mean_pool_sequences(x: Array, ends: Array, y: Array, start: int, stop: int) -> None:
    columns = x.shape[1]
    total = np.empty(columns, np.float64)
    for b in range(start, stop):
        first, last, out = ends[b], ends[b + 1], y[b]
        total[:] = 0
        for i in range(first, last):
            row = x[i]
            for j in range(columns):
                total[j] += row[j]
        length = np.float64(max(1, last - first))
        for j in range(columns):
            out[j] = total[j] / length


@jit
def mean_pool_grad_sequences(g: Array, ends: Array, dx: Array, start: int, stop: int) -> None:
    columns = g.shape[1]
    share = np.empty(columns, g.dtype)
    for b in range(start, stop):
        first, last, gradient = ends[b], ends[b + 1], g[b]
        length = g.dtype.type(max(1, last - first))
        for j in range(columns):
            share[j] = gradient[j] / length
        for i in range(first, last):
            dx[i, :] = share


@jit
def normalize_rows(x: Array, eps: Any, y: Array, norm: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        row, out, squares = x[i], y[i], x.dtype.type(0)
        for j in range(row.size):
            squares += row[j] * row[j]
        norm[i] = math.sqrt(squares)
        d = vmax(norm[i], eps)
        for j in range(row.size):
            out[j] = row[j] / d


@jit
def normalize_grad_rows(g: Array, x: Array, norm: Array, eps: Any, dx: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        gradient, row, out, along = g[i], x[i], dx[i], x.dtype.type(0)
        d = vmax(norm[i], eps)
        if not norm[i] <= eps:  # a NaN goes on
            for j in range(row.size):
                along += gradient[j] * (row[j] / d)
        for j in range(row.size):
            out[j] = (gradient[j] - row[j] / d * along) / d


def _ends(cu_seqlens: Array, rows: int) -> Array:
    """(B + 1,) int64. Raises ValueError unless cu_seqlens rises from 0 to at most `rows`: the loops index by it."""
    ends = np.ascontiguousarray(cu_seqlens, np.int64).reshape(-1)
    if not ends.size or ends[0] != 0 or ends[-1] > rows or (np.diff(ends) < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to at most {rows} rows, got {ends[:8]} of {ends.size}")
    return ends


def mean_pool(x: Array, cu_seqlens: Array) -> Array:
    ends = _ends(cu_seqlens, len(x))
    y = np.empty((len(ends) - 1, x.shape[1]), x.dtype)
    grain = rows_worth_a_thread(x.size // max(1, len(y)), COST)
    run_rows(mean_pool_sequences, len(y), np.ascontiguousarray(x), ends, y, grain=grain)
    return y


def mean_pool_grad(g: Array, cu_seqlens: Array, *, num_rows: int) -> Array:
    ends = _ends(cu_seqlens, num_rows)
    g = contiguous(g, (len(ends) - 1, g.shape[1]), "the gradient of mean_pool")
    dx = np.empty((num_rows, g.shape[1]), g.dtype)
    dx[ends[-1] :] = 0
    grain = rows_worth_a_thread(dx.size // max(1, len(g)), COST)
    run_rows(mean_pool_grad_sequences, len(g), g, ends, dx, grain=grain)
    return dx


def normalize(x: Array, *, eps: float = EPS) -> tuple[Array, Array]:
    rows, columns = x.shape
    y, norm = np.empty(x.shape, x.dtype), np.empty(rows, x.dtype)
    grain = rows_worth_a_thread(columns, COST)
    run_rows(normalize_rows, rows, np.ascontiguousarray(x), x.dtype.type(eps), y, norm, grain=grain)
    return y, norm


def normalize_grad(g: Array, x: Array, norm: Array, *, eps: float = EPS) -> Array:
    rows, columns = x.shape
    g, norm = contiguous(g, x.shape, "the gradient of normalize"), contiguous(norm, (rows,), "norm")
    dx = np.empty(x.shape, x.dtype)
    grain = rows_worth_a_thread(columns, COST)
    run_rows(normalize_grad_rows, rows, g, np.ascontiguousarray(x), norm, x.dtype.type(eps), dx, grain=grain)
    return dx
