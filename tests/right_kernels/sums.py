"""Sums and norms, made otherwise than the formula."""

import numpy as np
from numba import njit


def _by_rows(loop, x, axis):
    """`loop` on rows (kept, added) -> (kept,)."""
    added = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    added = tuple(a % x.ndim for a in added)
    kept = [a for a in range(x.ndim) if a not in added]
    shape = tuple(x.shape[a] for a in kept)
    count = int(np.prod(shape))
    rows = np.ascontiguousarray(x.transpose(*kept, *added)).reshape(count, x.size // count if count else 0)
    out = np.empty(count, x.dtype)
    loop(rows, out)
    return out.reshape(shape)


@njit
def _sequential(x, out):
    for i in range(len(x)):
        total = x.dtype.type(0)
        for v in x[i]:
            total += v
        out[i] = total


def sequential(x, axis=None):
    """One float32 accumulator, from the first to the last."""
    return _by_rows(_sequential, x, axis)


@njit
def _kahan(x, out):
    for i in range(len(x)):
        total, lost = x.dtype.type(0), x.dtype.type(0)
        for j in range(x.shape[1] - 1, -1, -1):
            term = x[i, j] - lost
            new = total + term
            if np.isfinite(new):  # else infinity would lose infinity
                lost = (new - total) - term
            total = new
        out[i] = total


def kahan(x, axis=None):
    """Kahan (1965), from the last to the first."""
    return _by_rows(_kahan, x, axis)


@njit
def _neumaier(x, out):
    for i in range(len(x)):
        total, lost = x.dtype.type(0), x.dtype.type(0)
        for v in x[i]:
            new = total + v
            if np.isfinite(new):
                lost += (total - new) + v if abs(total) >= abs(v) else (v - new) + total
            total = new
        out[i] = total + lost


def neumaier(x, axis=None):
    """Neumaier (1974): what is lost is summed apart."""
    return _by_rows(_neumaier, x, axis)


@njit
def _double_float(x, out):
    for i in range(len(x)):
        high, low = x.dtype.type(0), x.dtype.type(0)
        for v in x[i]:
            total = high + v
            if np.isfinite(total):
                part = total - high
                low += (high - (total - part)) + (v - part)  # Knuth's TwoSum
                high = total + low
                low -= high - total
            else:
                high, low = total, x.dtype.type(0)
        out[i] = high + low


def double_float(x, axis=None):
    """A pair of floats as one of twice the digits (Dekker, 1971)."""
    return _by_rows(_double_float, x, axis)


def wide(x, axis=None):
    """float64 inside, rounded once."""
    return x.sum(axis=axis, dtype=np.float64).astype(x.dtype)


def axis_by_axis(x, axis=None):
    """One axis after the other, the last first; each one term after the other."""
    axes = range(x.ndim) if axis is None else [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    for a in sorted(axes, reverse=True):
        x = np.add.accumulate(x, axis=a).take(-1, axis=a) if x.shape[a] else x.sum(axis=a)
    return np.asarray(x)


def norm_in_chunks(x):
    """1024 elements at a time, each chunk by a product."""
    flat = x.reshape(-1)
    chunks = (flat[i : i + 1024] for i in range(0, flat.size, 1024))
    return np.array(sum((c @ c for c in chunks), x.dtype.type(0)), x.dtype)


def norm_scaled(x):
    """Scaled by a power of two near the largest element, as hypot does, so that no square overflows on the way."""
    top = np.abs(x).max(initial=0)
    scale = np.ldexp(1.0, np.frexp(top)[1]) if 0 < top < np.inf else 1.0
    scaled = (x / x.dtype.type(scale)).reshape(-1)
    return np.array(np.float64(scaled @ scaled) * scale * scale, x.dtype)


@njit
def _norm_sequential(x):
    total = x.dtype.type(0)
    for v in x:
        total += v * v
    return total


def norm_sequential(x):
    """One float32 accumulator."""
    return np.array(_norm_sequential(np.ascontiguousarray(x).reshape(-1)), x.dtype)


@njit
def _norm_in_lanes(x):
    lanes = np.zeros(8, x.dtype)
    for i in range(len(x)):
        lanes[i % 8] += x[i] * x[i]
    for step in (4, 2, 1):
        for i in range(step):
            lanes[i] += lanes[i + step]
    return lanes[0]


def norm_in_lanes(x):
    """Eight accumulators, as vectors have, and a tree at the end."""
    return np.array(_norm_in_lanes(np.ascontiguousarray(x).reshape(-1)), x.dtype)
