"""Cross entropy: the logits of a row are read once from memory; loss and gradient are made while they are in cache."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minibert.kernels.cpu.arrays import contiguous, row_numbers
from minibert.kernels.cpu.bfloat16 import narrowed, widened
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import constant, exp, vmax
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.cross_entropy import IGNORED
from minibert.kernels.linear.cpu import product_with_transpose
from minibert.kernels.op import Array, is_bfloat16, takes_bfloat16


@jit
def cross_entropy_rows(
    logits: Array, labels: Array, count: int, losses: Array, dlogits: Array, start: int, stop: int
) -> None:
    """`count` rows are not ignored."""
    for i in range(start, stop):
        row, out = logits[i], dlogits[i]
        if labels[i] == IGNORED:
            losses[i], out[:] = 0, 0
            continue
        top = row[0]
        for j in range(row.size):
            z = row[j]
            out[j] = z
            top = vmax(top, z)
        losses[i] = loss_and_gradient(out, top, labels[i], count)


@jit
def bias_cross_entropy_rows(
    logits: Array, bias: Array, labels: Array, count: int, losses: Array, start: int, stop: int
) -> None:
    """Cross entropy of logits + bias, which are overwritten by their gradient."""
    for i in range(start, stop):
        row = logits[i]
        if labels[i] == IGNORED:
            losses[i], row[:] = 0, 0
            continue
        top = row[0] + bias[0]
        for j in range(row.size):
            z = row[j] + bias[j]
            row[j] = z
            top = vmax(top, z)
        losses[i] = loss_and_gradient(row, top, labels[i], count)


@jit
def loss_and_gradient(row: Array, top: float, label: int, count: int) -> float:
    """The loss of one row of `count`, in float64, and its gradient in place of the logits.

    Compiled by `jit`: the sums of an `inline` or `helper` keep their order, and so do not vectorise. In place: had it
    one array to read and one to write, callers that give the same for both would get scalar code.
    """
    loss = np.float64(top) - np.float64(row[label])
    total = constant(0.0, top)
    for j in range(row.size):
        e = exp(row[j] - top)
        row[j] = e
        total += e
    rows = type(top)(count)
    hit = (row[label] / total - constant(1.0, top)) / rows
    share = constant(1.0, top) / (total * rows)
    for j in range(row.size):
        row[j] *= share
    row[label] = hit
    return loss + math.log(np.float64(total))


def _labels(labels: Array, rows: int, classes: int) -> tuple[Array, int]:
    """(rows,) int64, and how many are not ignored (1 where all are, to divide by).

    Raises ValueError unless there is one in [0, classes), or IGNORED, for each row: the loops index by them.
    """
    labels = contiguous(labels, (rows,), "labels")
    kept = labels[labels != IGNORED]
    row_numbers(kept, classes, "labels")
    return labels.astype(np.int64, copy=False), max(1, len(kept))


def _mean(losses: Array, count: int, dtype: np.dtype[Any]) -> Array:
    """Added in float64, rounded once."""
    return np.asarray(losses.sum() / count, dtype)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    rows, classes = logits.shape
    labels, count = _labels(labels, rows, classes)
    losses, dlogits = np.empty(rows), np.empty(logits.shape, logits.dtype)
    grain = rows_worth_a_thread(classes)
    run_rows(cross_entropy_rows, rows, np.ascontiguousarray(logits), labels, count, losses, dlogits, grain=grain)
    return _mean(losses, count, logits.dtype), dlogits


@takes_bfloat16
def linear_cross_entropy(x: Array, weight: Array, bias: Array, labels: Array) -> tuple[Array, Array]:
    rows, classes = len(x), len(weight)
    bias = contiguous(bias, (classes,), "bias")
    narrow = x.dtype if is_bfloat16(x) else None
    bias = bias if narrow is None else widened(bias)
    labels, count = _labels(labels, rows, classes)
    losses, logits = np.empty(rows), product_with_transpose(x, weight)
    grain = rows_worth_a_thread(classes)
    run_rows(bias_cross_entropy_rows, rows, logits, bias, labels, count, losses, grain=grain)
    dlogits = logits if narrow is None else narrowed(logits, narrow)
    return _mean(losses, count, logits.dtype), dlogits
