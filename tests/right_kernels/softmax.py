"""softmax and its gradient, made otherwise than the formula."""

import math

import numpy as np
from numba import njit, prange


def _by_rows(loop, *arrays):
    out = np.empty(arrays[0].shape, arrays[0].dtype)
    columns = out.shape[-1]
    loop(*(np.ascontiguousarray(a).reshape(-1, columns) for a in arrays), out.reshape(-1, columns))
    return out


@njit
def _online(x, y):
    for i in range(x.shape[0]):
        top, total = x.dtype.type(-np.inf), x.dtype.type(0)
        for z in x[i]:
            if z != -np.inf:  # adds nothing; and -inf - -inf is none
                new = z if z > top else top
                total = total * math.exp(top - new) + math.exp(z - new)
                top = new
        for j in range(x.shape[1]):
            y[i, j] = math.exp(x[i, j] - top) / total


def online(x):
    """Maximum and sum in one pass, rescaled as the maximum grows (Milakov and Gimelshein, 2018)."""
    return _by_rows(_online, x)


@njit(parallel=True)
def _powers_of_two(x, y):
    for i in prange(x.shape[0]):
        top, total = -np.inf, 0.0
        for z in x[i]:
            if z > top:
                top = z
        for j in range(x.shape[1] - 1, -1, -1):
            total += np.exp2((np.float64(x[i, j]) - top) * 1.4426950408889634)
        for j in range(x.shape[1]):
            y[i, j] = np.exp2((np.float64(x[i, j]) - top) * 1.4426950408889634) / total


def powers_of_two(x):
    """exp z = 2^(z log2 e) in float64, summed from the last to the first, rows in parallel."""
    return _by_rows(_powers_of_two, x)


def split(x):
    """Blocks of 32 columns, each with a maximum and a sum of its own, which are merged at the end."""
    blocks = [x[..., i : i + 32] for i in range(0, x.shape[-1], 32)]
    tops = [b.max(axis=-1, keepdims=True) for b in blocks]
    zeroed = [np.where(np.isneginf(t), 0, t).astype(x.dtype) for t in tops]
    top = np.concatenate(tops, axis=-1).max(axis=-1, keepdims=True)
    totals = [np.exp(b - z).sum(axis=-1, keepdims=True) for b, z in zip(blocks, zeroed, strict=True)]
    total = sum(s * np.exp(t - top) for s, t in zip(totals, tops, strict=True))
    return np.concatenate([np.exp(b - top) / total for b in blocks], axis=-1)


def through_logarithm(x):
    """exp(d - log sum exp d): no division."""
    d = x - x.max(axis=-1, keepdims=True)
    return np.exp(d - np.log(np.exp(d).sum(axis=-1, keepdims=True)))


def reciprocal(x):
    """One division for each row, and products; whoever adds by columns adds one after the other."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e * (1 / np.add.accumulate(e, axis=-1)[..., -1:])


@njit
def _grad_reversed(g, y, dx):
    for i in range(g.shape[0]):
        total = g.dtype.type(0)
        for j in range(g.shape[1] - 1, -1, -1):
            total += g[i, j] * y[i, j]
        for j in range(g.shape[1]):
            dx[i, j] = y[i, j] * (g[i, j] - total)


def grad_reversed(g, y):
    """One float32 accumulator, from the last column to the first."""
    return _by_rows(_grad_reversed, g, y)


def grad_distributed(g, y):
    """y g - y sum(g y), from products that are there already."""
    gy = g * y
    return gy - y * gy.sum(axis=-1, keepdims=True)


def grad_wide(g, y):
    """float64 inside, rounded once."""
    wide, p = np.float64(g), np.float64(y)
    return (p * (wide - (wide * p).sum(axis=-1, keepdims=True))).astype(g.dtype)
