"""softmax and its gradient, one row at a time: every pass after the first finds its row in cache."""

from __future__ import annotations

import numpy as np

from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import constant, exp, vmax
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.op import Array


@jit
def softmax_rows(x: Array, y: Array, start: int, stop: int) -> None:
    columns = x.shape[1]
    for i in range(start, stop):
        row, out = x[i], y[i]
        top = row[0]
        for j in range(columns):
            top = vmax(top, row[j])
        for j in range(columns):
            out[j] = exp(row[j] - top)
        total = constant(0.0, top)
        for j in range(columns):  # a loop of its own: see `jit`
            total += out[j]
        share = constant(1.0, total) / total
        for j in range(columns):
            out[j] *= share


@jit
def softmax_grad_rows(g: Array, y: Array, dx: Array, start: int, stop: int) -> None:
    columns = y.shape[1]
    for i in range(start, stop):
        gradient, row, out = g[i], y[i], dx[i]
        total = constant(0.0, row[0])
        for j in range(columns):
            total += gradient[j] * row[j]
        for j in range(columns):
            out[j] = row[j] * (gradient[j] - total)


def _rows(x: Array) -> Array:
    """Contiguous (rows, columns), columns the last axis."""
    return np.ascontiguousarray(x).reshape(-1, max(1, x.shape[-1]))


def softmax(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    rows = _rows(x)
    run_rows(softmax_rows, len(rows), rows, _rows(y), grain=rows_worth_a_thread(rows.shape[1]))
    return y


def softmax_grad(g: Array, y: Array) -> Array:
    if g.shape != y.shape:
        raise ValueError(f"softmax_grad needs g and y of one shape, got {g.shape} and {y.shape}")
    dx = np.empty(y.shape, y.dtype)
    rows = _rows(y)
    grain = rows_worth_a_thread(rows.shape[1], cost=0.5)
    run_rows(softmax_grad_rows, len(rows), _rows(g), rows, _rows(dx), grain=grain)
    return dx
