"""layer_norm and add_layer_norm with their gradients, wrong in the ways that `tests/faults/table.py` tells."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from minibert.kernels.philox import NO_STREAM, Stream, keep_mask

Array = np.ndarray[Any, Any]
Several = tuple[Array, ...]


@njit(error_model="numpy")
def moments(x: Array, counted: int) -> tuple[Array, Array]:
    """Mean and variance of each row over its first `counted` columns."""
    mean, var = np.zeros(len(x)), np.zeros(len(x))
    for i in range(len(x)):
        for j in range(counted):
            mean[i] += x[i, j]
        mean[i] /= counted
        for j in range(counted):
            var[i] += (x[i, j] - mean[i]) ** 2
        var[i] /= counted
    return mean, var


@njit(error_model="numpy")
def written(x: Array, weight: Array, bias: Array, mean: Array, rstd: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    for i in range(len(x)):
        for j in range(x.shape[1]):
            y[i, j] = (x[i, j] - mean[i]) * rstd[i] * weight[j] + bias[j]
    return y


def finished(x: Array, weight: Array, bias: Array, mean: Array, rstd: Array) -> Several:
    weight, bias = np.ascontiguousarray(weight), np.ascontiguousarray(bias)
    y = written(np.ascontiguousarray(x), weight, bias, mean, rstd)
    return y, mean.astype(x.dtype), rstd.astype(x.dtype)


def by_moments(x: Array, weight: Array, bias: Array, eps: float, counted: int | None = None) -> Several:
    mean, var = moments(np.ascontiguousarray(x), x.shape[1] if counted is None else counted)
    return finished(x, weight, bias, mean, 1 / np.sqrt(var + eps))


def right_layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    return by_moments(x, weight, bias, eps)


def first_4096_columns(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    return by_moments(x, weight, bias, eps, min(4096, x.shape[1]))


def tail_lost_in_many_rows(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    packed = len(x) > 8192 and x.shape[1] > 4
    return by_moments(x, weight, bias, eps, x.shape[1] // 4 * 4 if packed else None)


def from_row_512_on(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    """Statistics lie in a table of 512 rows."""
    mean, var = moments(np.ascontiguousarray(x), x.shape[1])
    place = np.arange(len(x)) % 512
    return finished(x, weight, bias, mean[place], 1 / np.sqrt(var[place] + eps))


def long_rows_of_many(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    many = len(x) > 128 and x.shape[1] > 64
    return by_moments(x, weight, bias, eps, x.shape[1] - 1 if many else None)


def packed_rows_to_40000(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    y, mean, rstd = by_moments(x, weight, bias, eps)
    if x.shape[1] % 4 == 0:
        y[40000:] = 0
    return y, mean, rstd


@njit(error_model="numpy")
def moments_at_once(x: Array, zero: float) -> tuple[Array, Array]:
    """E[x] and E[x^2] - E[x]^2, in the precision of `zero`."""
    mean, var = np.zeros(len(x)), np.zeros(len(x))
    for i in range(len(x)):
        total, squares = zero, zero
        for j in range(x.shape[1]):
            total += x[i, j]
            squares += x[i, j] * x[i, j]
        mean[i] = total / x.shape[1]
        var[i] = squares / x.shape[1] - mean[i] * mean[i]
    return mean, var


def one_pass(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    mean, var = moments_at_once(np.ascontiguousarray(x), x.dtype.type(0))
    return finished(x, weight, bias, mean, 1 / np.sqrt(np.maximum(var, 0) + eps))


def one_wide_pass(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    """In float64 the difference is exact enough, but for rows of one number: below zero, its root is NaN."""
    wide = np.ascontiguousarray(x, np.float64)
    mean, var = moments_at_once(wide, 0.0)
    return finished(x, weight, bias, mean, 1 / np.sqrt(var + eps))


def eps_outside_the_root(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    mean, var = moments(np.ascontiguousarray(x), x.shape[1])
    return finished(x, weight, bias, mean, 1 / (np.sqrt(var) + eps))


def eps_of_another_model(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    return by_moments(x, weight, bias, max(eps, 1e-5))


def unbiased(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    mean, var = moments(np.ascontiguousarray(x), x.shape[1])
    return finished(x, weight, bias, mean, 1 / np.sqrt(var * x.shape[1] / max(1, x.shape[1] - 1) + eps))


def mean_in_half(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    mean, var = moments(np.ascontiguousarray(x), x.shape[1])
    return finished(x, weight, bias, mean.astype(np.float16).astype(np.float64), 1 / np.sqrt(var + eps))


def nan_is_zero(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    return by_moments(np.nan_to_num(x, nan=0.0), weight, bias, eps)


def nan_until_the_last_row(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    """The sum of each row is what a running total over all rows grows by."""
    totals = np.concatenate([[0.0], x.sum(axis=1, dtype=np.float64).cumsum()])
    mean = (totals[1:] - totals[:-1]) / x.shape[1]
    var = ((x - mean[:, None]) ** 2).mean(axis=1)
    return finished(x, weight, bias, mean, 1 / np.sqrt(var + eps))


weights: dict[int, tuple[Array, Array]] = {}


def remembers_its_weight(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> Several:
    """The weight is made wide once: until an optimiser has written to it."""
    if id(weight) not in weights:
        if len(weights) > 8:
            weights.clear()
        weights[id(weight)] = weight, weight.astype(np.float64)
    return by_moments(x, weights[id(weight)][1], bias, eps)


@njit(error_model="numpy")
def gradient(g: Array, x: Array, weight: Array, mean: Array, rstd: Array, counted: int, term: float) -> Several:
    """Of the first `counted` rows those of weight and bias; `term` is 1."""
    dx, columns = np.empty(x.shape, x.dtype), x.shape[1]
    dweight, dbias = np.zeros(columns), np.zeros(columns)
    for i in range(len(x)):
        sum_h, sum_hn = 0.0, 0.0
        for j in range(columns):
            n = (np.float64(x[i, j]) - mean[i]) * rstd[i]
            h = np.float64(g[i, j]) * weight[j]
            sum_h += h
            sum_hn += h * n
            if i < counted:
                dweight[j] += g[i, j] * n
                dbias[j] += g[i, j]
        for j in range(columns):
            n = (np.float64(x[i, j]) - mean[i]) * rstd[i]
            dx[i, j] = (np.float64(g[i, j]) * weight[j] - (sum_h + term * n * sum_hn) / columns) * rstd[i]
    return dx, dweight, dbias


def gradients(
    g: Array, x: Array, weight: Array, mean: Array, rstd: Array, counted: int | None = None, term: float = 1.0
) -> Several:
    arrays = (np.ascontiguousarray(a) for a in (g, x, weight, mean, rstd))
    dx, dweight, dbias = gradient(*arrays, len(x) if counted is None else counted, term)
    return dx, dweight.astype(x.dtype), dbias.astype(x.dtype)


def right_layer_norm_grad(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Several:
    return gradients(g, x, weight, mean, rstd)


def weight_of_65536_rows(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Several:
    return gradients(g, x, weight, mean, rstd, 65536)


def last_rows_lost(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Several:
    whole = len(x) // 2048 * 2048
    return gradients(g, x, weight, mean, rstd, whole or None)


def tail_of_32_rows_lost(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Several:
    tiled = len(x) > 128 and x.shape[1] > 128
    return gradients(g, x, weight, mean, rstd, len(x) // 32 * 32 if tiled else None)


def third_term_lost(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Several:
    return gradients(g, x, weight, mean, rstd, term=0.0)


def swapped(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Several:
    dx, dweight, dbias = gradients(g, x, weight, mean, rstd)
    return dx, dbias, dweight


def bias_of_weighted(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Several:
    dx, dweight, _ = gradients(g, x, weight, mean, rstd)
    return dx, dweight, (g * weight).sum(axis=0)


def dropped_out(x: Array, rate: float, stream: Stream) -> Array:
    if rate == 0:
        return x
    return np.where(keep_mask(np, stream, x.shape, rate), x * x.dtype.type(1 / (1 - rate)), x.dtype.type(0))


def right_add_layer_norm(
    x: Array, residual: Array, weight: Array, bias: Array,
    *, eps: float = 1e-12, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Several:  # fmt: skip
    z = dropped_out(x, rate, stream) + residual
    y, mean, rstd = by_moments(z, weight, bias, eps)
    return y, z, mean, rstd


def layer_forgotten(
    x: Array, residual: Array, weight: Array, bias: Array,
    *, eps: float = 1e-12, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Several:  # fmt: skip
    stream = Stream(*stream)._replace(layer=0)
    return right_add_layer_norm(x, residual, weight, bias, eps=eps, rate=rate, stream=stream)


def residual_dropped(
    x: Array, residual: Array, weight: Array, bias: Array,
    *, eps: float = 1e-12, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Several:  # fmt: skip
    return right_add_layer_norm(x, dropped_out(residual, rate, stream), weight, bias, eps=eps, rate=rate, stream=stream)


def right_add_layer_norm_grad(
    g: Array, z: Array, weight: Array, mean: Array, rstd: Array, *, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Several:
    dz, dweight, dbias = gradients(g, z, weight, mean, rstd)
    return dropped_out(dz, rate, stream).copy(), dz, dweight, dbias


def dropout_on_both(
    g: Array, z: Array, weight: Array, mean: Array, rstd: Array, *, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Several:
    dx, _, dweight, dbias = right_add_layer_norm_grad(g, z, weight, mean, rstd, rate=rate, stream=stream)
    return dx, dx.copy(), dweight, dbias
