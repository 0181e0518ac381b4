"""attention and its gradient, made otherwise than the formula."""

import math
from itertools import pairwise

import numpy as np
from numba import njit

from minibert.kernels.philox import random_words, threshold

STREAM = (0, 0, 0, 0)


def _sequences(cu_seqlens):
    return [(int(a), int(b)) for a, b in pairwise(cu_seqlens) if b > a]


def _kept(cu_seqlens, heads, rate, stream):
    """(first, last, which scores (heads, t, t) are kept) of each sequence."""
    width = -(-max((b - a for a, b in _sequences(cu_seqlens)), default=0) // 4) * 4
    for first, last in _sequences(cu_seqlens):
        t = last - first
        if rate == 0:
            yield first, last, np.ones((heads, t, t), bool)
        else:
            words = random_words(stream, t * heads * width, start=first * heads * width)
            yield first, last, (words >= threshold(rate)).reshape(t, heads, width)[:, :, :t].swapaxes(0, 1)


def _heads(x, heads):
    """(t, C) -> (heads, t, D), a copy."""
    return np.ascontiguousarray(x.reshape(len(x), heads, x.shape[1] // heads).swapaxes(0, 1))


def _rows(x):
    """(heads, t, D) -> (t, C)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])


def _attend(one_sequence, qkv, cu_seqlens, heads, rate, stream):
    c = qkv.shape[1] // 3
    y, lse = np.empty((len(qkv), c), qkv.dtype), np.empty((len(qkv), heads), qkv.dtype)
    for first, last, kept in _kept(cu_seqlens, heads, rate, stream):
        q, k, v = (_heads(qkv[first:last, i * c : (i + 1) * c], heads) for i in range(3))
        out, log_total = one_sequence(q, k, v, kept, qkv.dtype.type(1 / (1 - rate)))
        y[first:last], lse[first:last] = _rows(out), log_total.T
    return y, lse


def _tiled(q, k, v, kept, scale):
    q = q * q.dtype.type(q.shape[2] ** -0.5)
    top, total = np.full(q.shape[:2], -np.inf, q.dtype), np.zeros(q.shape[:2], q.dtype)
    out = np.zeros(q.shape, q.dtype)
    for j in range(0, k.shape[1], 16):
        scores = q @ k[:, j : j + 16].swapaxes(1, 2)
        new = np.maximum(top, scores.max(axis=2))
        shrunk, p = np.exp(top - new), np.exp(scores - new[:, :, None])
        total = total * shrunk + p.sum(axis=2)
        out = out * shrunk[:, :, None] + np.where(kept[:, :, j : j + 16], p, 0).astype(q.dtype) @ v[:, j : j + 16]
        top = new
    return out * (scale / total)[:, :, None], top + np.log(total)


def tiled(qkv, cu_seqlens, *, num_heads, rate=0.0, stream=STREAM):
    """Flash attention by 16 keys (Dao et al., 2022): q scaled first, the sum divided and scaled at the end."""
    return _attend(_tiled, qkv, cu_seqlens, num_heads, rate, stream)


@njit
def _online(q, k, v, kept, scale):
    heads, t, d = q.shape
    out, lse = np.empty(q.shape, q.dtype), np.empty((heads, t), q.dtype)
    root = q.dtype.type(d**-0.5)
    for h in range(heads):
        for n in range(t):
            top, total, row = q.dtype.type(-np.inf), q.dtype.type(0), np.zeros(d, q.dtype)
            for j in range(t):
                s = q.dtype.type(0)
                for c in range(d):
                    s += q[h, n, c] * k[h, j, c]
                s *= root
                new = s if s > top else top
                shrunk, p = math.exp(top - new), math.exp(s - new)
                total = total * shrunk + p
                for c in range(d):
                    row[c] = row[c] * shrunk + (p * v[h, j, c] if kept[h, n, j] else q.dtype.type(0))
                top = new
            for c in range(d):
                out[h, n, c] = row[c] / total * scale
            lse[h, n] = top + math.log(total)
    return out, lse


def online(qkv, cu_seqlens, *, num_heads, rate=0.0, stream=STREAM):
    """A key at a time, float32 accumulators, one after the other."""
    return _attend(_online, qkv, cu_seqlens, num_heads, rate, stream)


def _powers_of_two(q, k, v, kept, scale):
    q, k, v = (np.float64(a) for a in (q, k, v))
    scores = q @ k.swapaxes(1, 2) * (q.shape[2] ** -0.5 / math.log(2))
    top = scores.max(axis=2, keepdims=True)
    e = np.exp2(scores - top)
    total = e.sum(axis=2, keepdims=True)
    return np.where(kept, e * float(scale), 0.0) @ v / total, ((top + np.log2(total)) * math.log(2))[:, :, 0]


def powers_of_two(qkv, cu_seqlens, *, num_heads, rate=0.0, stream=STREAM):
    """Scores in units of log 2, so that exp is a power of two; float64 inside."""
    return _attend(_powers_of_two, qkv, cu_seqlens, num_heads, rate, stream)


def _gradients(one_sequence, g, qkv, y, lse, cu_seqlens, heads, rate, stream):
    c = qkv.shape[1] // 3
    dqkv = np.empty(qkv.shape, qkv.dtype)
    for first, last, kept in _kept(cu_seqlens, heads, rate, stream):
        q, k, v = (_heads(qkv[first:last, i * c : (i + 1) * c], heads) for i in range(3))
        gy, ys = _heads(g[first:last], heads), _heads(y[first:last], heads)
        scale = qkv.dtype.type(1 / (1 - rate))
        parts = one_sequence(gy, q, k, v, ys, lse[first:last].T[:, :, None], kept, scale)
        dqkv[first:last] = np.concatenate([_rows(p) for p in parts], axis=1)
    return dqkv


def _delta_from_p(g, q, k, v, y, lse, kept, scale):
    root = q.dtype.type(q.shape[2] ** -0.5)
    p = np.exp((q @ k.swapaxes(1, 2)) * root - lse)
    mask = np.where(kept, scale, q.dtype.type(0))
    dp = np.where(kept, g @ v.swapaxes(1, 2) * scale, q.dtype.type(0))
    ds = p * (dp - (p * dp).sum(axis=2, keepdims=True)) * root
    return ds @ k, ds.swapaxes(1, 2) @ q, (p * mask).swapaxes(1, 2) @ g


def grad_delta_from_p(g, qkv, y, lse, cu_seqlens, *, num_heads, rate=0.0, stream=STREAM):
    """sum g y recomputed as sum p dp: the output that forward kept is not read."""
    return _gradients(_delta_from_p, g, qkv, y, lse, cu_seqlens, num_heads, rate, stream)


def _p_from_scores(g, q, k, v, y, lse, kept, scale):
    root = q.dtype.type(q.shape[2] ** -0.5)
    scores = (q * root) @ k.swapaxes(1, 2)
    e = np.exp(scores - scores.max(axis=2, keepdims=True))
    p = e / e.sum(axis=2, keepdims=True)
    dp = np.where(kept, g @ v.swapaxes(1, 2) * scale, q.dtype.type(0))
    ds = p * (dp - (g * y).sum(axis=2, keepdims=True))
    dropped = np.where(kept, p * scale, q.dtype.type(0))
    return ds @ k * root, ds.swapaxes(1, 2) @ (q * root), dropped.swapaxes(1, 2) @ g


def grad_p_from_scores(g, qkv, y, lse, cu_seqlens, *, num_heads, rate=0.0, stream=STREAM):
    """Probabilities by softmax once more: the log sum exp that forward kept is not read."""
    return _gradients(_p_from_scores, g, qkv, y, lse, cu_seqlens, num_heads, rate, stream)


def _by_keys(g, q, k, v, y, lse, kept, scale):
    root = q.dtype.type(q.shape[2] ** -0.5)
    delta = (g * y).sum(axis=2, keepdims=True)
    dq, dk, dv = np.zeros(q.shape, q.dtype), np.empty(q.shape, q.dtype), np.empty(q.shape, q.dtype)
    for j in range(0, q.shape[1], 8):
        keys = slice(j, j + 8)
        p = np.exp(q @ k[:, keys].swapaxes(1, 2) * root - lse)
        dp = np.where(kept[:, :, keys], g @ v[:, keys].swapaxes(1, 2) * scale, q.dtype.type(0))
        ds = p * (dp - delta) * root
        dv[:, keys] = np.where(kept[:, :, keys], p * scale, q.dtype.type(0)).swapaxes(1, 2) @ g
        dk[:, keys] = ds.swapaxes(1, 2) @ q
        dq += ds @ k[:, keys]
    return dq, dk, dv


def grad_by_keys(g, qkv, y, lse, cu_seqlens, *, num_heads, rate=0.0, stream=STREAM):
    """Eight keys at a time, as flash attention's gradient goes; dq grows tile by tile."""
    return _gradients(_by_keys, g, qkv, y, lse, cu_seqlens, num_heads, rate, stream)
