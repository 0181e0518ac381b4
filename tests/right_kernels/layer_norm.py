"""layer_norm, add_layer_norm and their gradients, made otherwise than the formula."""

import math

import numpy as np
from numba import njit, prange

from minibert.kernels.philox import keep_mask


@njit
def _welford(x, weight, bias, eps, y, means, rstds):
    one = x.dtype.type(1)
    for i in range(x.shape[0]):
        mean, squares = x.dtype.type(0), x.dtype.type(0)
        for j in range(x.shape[1]):
            off = x[i, j] - mean
            mean += off / x.dtype.type(j + 1)
            squares += off * (x[i, j] - mean)
        rstd = one / math.sqrt(squares / x.dtype.type(x.shape[1]) + x.dtype.type(eps))
        for j in range(x.shape[1]):
            y[i, j] = (x[i, j] - mean) * rstd * weight[j] + bias[j]
        means[i], rstds[i] = mean, rstd


def _normalised(loop, x, weight, bias, eps):
    y, means, rstds = np.empty(x.shape, x.dtype), np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    loop(*map(np.ascontiguousarray, (x, weight, bias)), eps, y, means, rstds)
    return y, means, rstds


def welford(x, weight, bias, eps=1e-12):
    """Mean and sum of squares in one pass (Welford, 1962), in float32."""
    return _normalised(_welford, x, weight, bias, eps)


@njit(parallel=True)
def _shifted(x, weight, bias, eps, y, means, rstds):
    columns = x.shape[1]
    for i in prange(x.shape[0]):
        shift, total, squares = np.float64(x[i, 0]), 0.0, 0.0
        for j in range(columns):
            off = x[i, j] - shift
            total += off
            squares += off * off
        off = total / columns
        rstd = 1 / math.sqrt(max(squares / columns - off * off, 0.0) + eps)
        for j in range(columns):
            y[i, j] = ((x[i, j] - shift) - off) * (rstd * weight[j]) + bias[j]
        means[i], rstds[i] = shift + off, rstd


def shifted(x, weight, bias, eps=1e-12):
    """E[(x - x0)^2] - E[x - x0]^2 in float64, x0 the first element; rows in parallel."""
    return _normalised(_shifted, x, weight, bias, eps)


def corrected(x, weight, bias, eps=1e-12):
    """Two passes, the second corrected by the sum that should be 0 (Chan, Golub, LeVeque, 1983)."""
    n = x.dtype.type(x.shape[1])
    mean = x.sum(axis=1) / n
    d = x - mean[:, None]
    off = d.sum(axis=1)
    rstd = 1 / np.sqrt(((d * d).sum(axis=1) - off * off / n) / n + x.dtype.type(eps))
    return d * (rstd[:, None] * weight) + bias, mean, rstd


def folded(x, weight, bias, eps=1e-12):
    """x (rstd w) + (b - mean rstd w): one product and one sum for each element, as at inference."""
    mean = x.mean(axis=1)
    rstd = 1 / np.sqrt(np.square(x - mean[:, None]).mean(axis=1) + x.dtype.type(eps))
    slope = rstd[:, None] * weight
    return x * slope + (bias - mean[:, None] * slope), mean, rstd


def merged(x, weight, bias, eps=1e-12):
    """Blocks of 64 columns, each with mean and squares of its own, merged in pairs (Chan et al., 1979)."""
    kind = x.dtype.type

    def moments(block):
        if block.shape[1] <= 64:
            mean = block.mean(axis=1)
            return block.shape[1], mean, np.square(block - mean[:, None]).sum(axis=1)
        middle = block.shape[1] // 128 * 64 or 64
        (m, a, p), (n, b, q) = moments(block[:, :middle]), moments(block[:, middle:])
        off = b - a
        return m + n, a + off * kind(n / (m + n)), p + q + off * off * kind(m * n / (m + n))

    count, mean, squares = moments(x)
    rstd = 1 / np.sqrt(squares / kind(count) + kind(eps))
    return (x - mean[:, None]) * rstd[:, None] * weight + bias, mean, rstd


def _statistics(x, eps=1e-12):
    wide = np.float64(x)
    mean = wide.mean(axis=1, keepdims=True)
    return mean, 1 / np.sqrt(np.square(wide - mean).mean(axis=1, keepdims=True) + eps)


def grad_recomputing(g, x, weight, mean, rstd):
    """Mean and rstd made again from x, in float64; what forward kept is not read."""
    mean, rstd = _statistics(x)
    n, h = (x - mean) * rstd, np.float64(g) * weight
    dx = (h - h.mean(axis=1, keepdims=True) - n * (h * n).mean(axis=1, keepdims=True)) * rstd
    return tuple(d.astype(x.dtype) for d in (dx, (g * n).sum(axis=0), g.sum(axis=0, dtype=np.float64)))


@njit
def _grad_by_rows(g, x, weight, mean, rstd, dx, dweight, dbias):
    columns = x.shape[1]
    dweight[:] = 0
    dbias[:] = 0
    for start in range(0, x.shape[0], 8):
        w, b = np.zeros(columns, x.dtype), np.zeros(columns, x.dtype)
        for i in range(start, min(start + 8, x.shape[0])):
            one, two = x.dtype.type(0), x.dtype.type(0)
            for j in range(columns):
                n, h = (x[i, j] - mean[i]) * rstd[i], g[i, j] * weight[j]
                one += h
                two += h * n
                w[j] += g[i, j] * n
                b[j] += g[i, j]
            one, two = one / x.dtype.type(columns), two / x.dtype.type(columns)
            for j in range(columns):
                n = (x[i, j] - mean[i]) * rstd[i]
                dx[i, j] = rstd[i] * (g[i, j] * weight[j] - (one + n * two))
        dweight += w
        dbias += b


def grad_by_rows(g, x, weight, mean, rstd):
    """Eight rows at a time, their dw and db apart; dx as rstd (h - (mean h + n mean(h n)))."""
    dx, dw, db = np.empty(x.shape, x.dtype), np.empty(weight.shape, x.dtype), np.empty(weight.shape, x.dtype)
    _grad_by_rows(*map(np.ascontiguousarray, (g, x, weight, mean, rstd)), dx, dw, db)
    return dx, dw, db


def grad_scaled_first(g, x, weight, mean, rstd):
    """rstd distributed: dx = rstd h - (rstd / C) (sum h + n sum(h n)), sums one term after the other."""
    r = rstd[:, None]
    n, h = (x - mean[:, None]) * r, g * weight
    one, two = (np.add.accumulate(a, axis=1)[:, -1:] for a in (h, h * n))
    return r * h - r / x.dtype.type(x.shape[1]) * (one + n * two), (n * g).sum(axis=0), g.sum(axis=0)


@njit
def _add_and_normalise(x, kept, scale, residual, weight, bias, eps, y, z, means, rstds):
    columns = x.shape[1]
    for i in range(x.shape[0]):
        total, squares = 0.0, 0.0
        for j in range(columns):
            z[i, j] = (x[i, j] * scale if kept[i, j] else x.dtype.type(0)) + residual[i, j]
            total += z[i, j]
        mean = total / columns
        for j in range(columns):
            squares += (z[i, j] - mean) ** 2
        rstd = 1 / math.sqrt(squares / columns + eps)
        for j in range(columns):
            y[i, j] = (z[i, j] - mean) * rstd * weight[j] + bias[j]
        means[i], rstds[i] = mean, rstd


def _mask(x, rate, stream):
    return np.ones(x.shape, bool) if rate == 0 else keep_mask(np, stream, x.shape, rate)


def add_fused(x, residual, weight, bias, eps=1e-12, rate=0.0, stream=(0, 0, 0, 0)):
    """Dropout, sum and statistics in one loop, float64 inside the row."""
    y, z, means, rstds = (np.empty(s, x.dtype) for s in (x.shape, x.shape, len(x), len(x)))
    arrays = map(np.ascontiguousarray, (residual, weight, bias))
    scale = x.dtype.type(1 / (1 - rate))
    _add_and_normalise(np.ascontiguousarray(x), _mask(x, rate, stream), scale, *arrays, eps, y, z, means, rstds)
    return y, z, means, rstds


def add_grad_recomputing(g, z, weight, mean, rstd, rate=0.0, stream=(0, 0, 0, 0)):
    """As `grad_recomputing`; then dropout of what is rounded."""
    dz, dw, db = grad_recomputing(g, z, weight, mean, rstd)
    scaled = dz * dz.dtype.type(1 / (1 - rate))
    return np.where(_mask(z, rate, stream), scaled, 0).astype(z.dtype), dz, dw, db
