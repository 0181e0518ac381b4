"""Products and linear layers, made otherwise than the formula."""

from math import prod

import numpy as np
from numba import njit
from scipy import special


def pairwise(parts):
    """The sum of a list of arrays, halves first."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return pairwise(parts[:middle]) + pairwise(parts[middle:])


def _batched(loop, a, b):
    """`loop` on matrices (batch, rows, k), (batch, k, columns) -> (batch, rows, columns)."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (
        np.ascontiguousarray(np.broadcast_to(m, (*batch, *m.shape[-2:]))).reshape(prod(batch), *m.shape[-2:])
        for m in (a, b)
    )
    c = np.empty((len(a), a.shape[1], b.shape[2]), a.dtype)
    loop(a, b, c)
    return c.reshape(*batch, *c.shape[1:])


@njit
def _sequential(a, b, c):
    c[:] = 0
    for n in range(len(a)):
        for i in range(a.shape[1]):
            for k in range(a.shape[2]):
                for j in range(b.shape[2]):
                    c[n, i, j] += a[n, i, k] * b[n, k, j]


def sequential(a, b):
    """One float32 accumulator for each element, from the first product to the last."""
    return _batched(_sequential, a, b)


@njit(fastmath={"reassoc", "contract"})
def _backwards(a, b, c):
    for n in range(len(a)):
        for i in range(a.shape[1]):
            for j in range(b.shape[2]):
                total = a.dtype.type(0)
                for k in range(a.shape[2] - 1, -1, -1):
                    total += a[n, i, k] * b[n, k, j]
                c[n, i, j] = total


def backwards(a, b):
    """From the last product to the first; LLVM may fuse and reorder."""
    return _batched(_backwards, a, b)


@njit
def _compensated(a, b, c):
    for n in range(len(a)):
        for i in range(a.shape[1]):
            for j in range(b.shape[2]):
                total, lost = a.dtype.type(0), a.dtype.type(0)
                for k in range(a.shape[2]):
                    term = a[n, i, k] * b[n, k, j] - lost
                    new = total + term
                    if np.isfinite(new):
                        lost = (new - total) - term
                    total = new
                c[n, i, j] = total


def compensated(a, b):
    """Kahan's sum (1965) of products that are rounded."""
    return _batched(_compensated, a, b)


def split(a, b):
    """Split-k: 16 columns of a at a time, the partial products added by halves."""
    starts = range(0, a.shape[-1], 16)
    return pairwise([a[..., i : i + 16] @ b[..., i : i + 16, :] for i in starts] or [a @ b])


def wide(a, b):
    """float64 inside, rounded once."""
    return (np.float64(a) @ np.float64(b)).astype(a.dtype)


def transposed(x, weight, bias):
    """(W x')' + b, on rows laid one after the other."""
    rows = x.reshape(-1, x.shape[-1])
    return (np.ascontiguousarray(weight) @ rows.T).T.reshape(*x.shape[:-1], len(weight)) + bias


def bias_as_a_column(x, weight, bias):
    """[x 1] [W b]': the bias is one more product."""
    ones = np.ones((*x.shape[:-1], 1), x.dtype)
    return np.concatenate([x, ones], axis=-1) @ np.concatenate([weight, bias[:, None]], axis=1).T


def bias_first(x, weight, bias):
    """Accumulators that begin with the bias, 8 columns of x at a time: as a tiled product with beta = 1 does."""
    y = np.empty((*x.shape[:-1], len(weight)), x.dtype)
    y[...] = bias
    for k in range(0, x.shape[-1], 8):
        y += x[..., k : k + 8] @ weight[:, k : k + 8].T
    return y


def gelu_through_erfc(x, weight, bias, approximate="none"):
    """x Phi(x) as x erfc(-x / sqrt 2) / 2, and x / (1 + exp(-2 u)) for the approximation; both in float64."""
    before = x @ weight.T + bias
    wide = np.float64(before)
    if approximate == "tanh":
        u = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
        return (wide / (1 + np.exp(-2 * u))).astype(x.dtype), before
    return (0.5 * wide * special.erfc(-wide * np.sqrt(0.5))).astype(x.dtype), before


def grad_by_rows(g, x):
    """64 rows at a time; db as a product with ones."""
    blocks = [(g[i : i + 64], x[i : i + 64]) for i in range(0, len(g), 64)] or [(g, x)]
    dweight = np.zeros((g.shape[1], x.shape[1]), g.dtype)
    for some, rows in blocks:
        dweight += some.T @ rows
    return dweight, pairwise([np.ones(len(some), g.dtype) @ some for some, _ in blocks])


def grad_in_einsum(g, x):
    """einsum's own loops, float64 inside."""
    return np.einsum("no,ni->oi", g, x, dtype=np.float64, casting="same_kind").astype(g.dtype), g.sum(0)


def add_grad_by_rows(total, g, x):
    """32 rows at a time, each added to the total at once: a product with beta = 1."""
    for i in range(0, len(g), 32):
        total += g[i : i + 32].T @ x[i : i + 32]
