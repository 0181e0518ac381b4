"""attention and its gradient, wrong in the ways that `tests/faults/table.py` tells."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit

from minibert.kernels.philox import NO_STREAM, Stream, random_words, threshold

Array = np.ndarray[Any, Any]
Two = tuple[Array, Array]


@njit(error_model="numpy")
def heads_of_sequences(
    qkv: Array, ends: Array, factors: Array, scale: float, lowest: float, used: int, keys: int, heads: int
) -> tuple[Array, Array]:
    """qkv (N, 3, H, D): of each head `used` numbers count, of each sequence `keys` keys, and `heads` heads are done.

    `factors` (N, H, width) is what dropout multiplies each probability by; of no size where it drops nothing.
    """
    y, lse = np.zeros(qkv[:, 0].shape, qkv.dtype), np.zeros(qkv[:, 0, :, 0].shape, qkv.dtype)
    for b in range(len(ends) - 1):
        first, count = ends[b], min(keys, ends[b + 1] - ends[b])
        p = np.empty(count)
        for i in range(first, ends[b + 1]):
            for h in range(heads):
                top = lowest
                for j in range(count):
                    p[j] = 0.0
                    for d in range(used):
                        p[j] += qkv[i, 0, h, d] * qkv[first + j, 1, h, d]
                    p[j] *= scale
                    if p[j] > top or p[j] != p[j]:
                        top = p[j]
                total = 0.0
                for j in range(count):
                    p[j] = math.exp(p[j] - top)
                    total += p[j]
                lse[i, h] = top + math.log(total)
                for j in range(count):
                    share = p[j] / total * (factors[i, h, j] if factors.size else 1.0)
                    for d in range(qkv.shape[3]):
                        y[i, h, d] += share * qkv[first + j, 2, h, d]
    return y, lse


def factors_of(cu_seqlens: Array, heads: int, rate: float, stream: Stream, width: int | None = None) -> Array:
    """(N, heads, width): 1 / (1 - rate) for what is kept, 0 for what is dropped; width as the op's docstring says."""
    if rate == 0 or len(cu_seqlens) < 2:
        return np.empty((0, 0, 0))
    tokens, longest = int(cu_seqlens[-1]), int(np.diff(cu_seqlens).max())
    width = -(-longest // 4) * 4 if width is None else width
    words = random_words(stream, tokens * heads * width)
    return ((words >= threshold(rate)) / (1 - rate)).reshape(tokens, heads, width)


def done(
    qkv: Array, cu_seqlens: Array, heads: int, rate: float, stream: Stream, lowest: float = -np.inf,
    used: int | None = None, keys: int = 1 << 30, most_heads: int = 1 << 30, scale: float | None = None,
    factors: Array | None = None,
) -> Two:  # fmt: skip
    tokens, size = len(qkv), qkv.shape[1] // 3 // heads
    if factors is None:
        factors = factors_of(cu_seqlens, heads, rate, stream)
    y, lse = heads_of_sequences(
        np.ascontiguousarray(qkv).reshape(tokens, 3, heads, size), np.ascontiguousarray(cu_seqlens), factors,
        size**-0.5 if scale is None else scale, lowest, size if used is None else used, keys, min(most_heads, heads),
    )  # fmt: skip
    return y.reshape(tokens, heads * size), lse


def right_attention(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    return done(qkv, cu_seqlens, num_heads, rate, stream)


def starts_at_zero(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    return done(qkv, cu_seqlens, num_heads, rate, stream, lowest=0.0)


def head_of_64(qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM) -> Two:
    return done(qkv, cu_seqlens, num_heads, rate, stream, used=min(64, qkv.shape[1] // 3 // num_heads))


def head_in_packs_of_4(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    size = qkv.shape[1] // 3 // num_heads
    return done(qkv, cu_seqlens, num_heads, rate, stream, used=size // 4 * 4 or size)


def head_in_pairs(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    """Wrong for 63, right for 46."""
    size = qkv.shape[1] // 3 // num_heads
    return done(qkv, cu_seqlens, num_heads, rate, stream, used=size // 2 * 2 if size > 32 else size)


def first_512_keys(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    return done(qkv, cu_seqlens, num_heads, rate, stream, keys=512)


def first_16_heads(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    return done(qkv, cu_seqlens, num_heads, rate, stream, most_heads=16)


def last_of_8_heads_and_128_keys(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    many = num_heads >= 8 and int(np.diff(cu_seqlens).max(initial=0)) > 128
    return done(qkv, cu_seqlens, num_heads, rate, stream, most_heads=num_heads - 1 if many else num_heads)


def head_of_112(qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM) -> Two:
    """Is done as one of 96."""
    size = qkv.shape[1] // 3 // num_heads
    return done(qkv, cu_seqlens, num_heads, rate, stream, used=96 if size == 112 else size)


def first_1024_sequences(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    factors = factors_of(cu_seqlens, num_heads, rate, stream)
    return done(qkv, cu_seqlens[:1025], num_heads, rate, stream, factors=factors)


def scale_of_64(qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM) -> Two:
    return done(qkv, cu_seqlens, num_heads, rate, stream, scale=0.125)


def words_of_the_first(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    """Every sequence drops what the first tokens of the batch drop."""
    factors = factors_of(cu_seqlens, num_heads, rate, stream)
    if factors.size:
        place = np.concatenate([np.arange(b - a) for a, b in pairwise(cu_seqlens.tolist())])
        factors = np.ascontiguousarray(factors[place])
    return done(qkv, cu_seqlens, num_heads, rate, stream, factors=factors)


def neighbours_times_zero(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    """Each sequence sees all keys of the batch; those of others have the probability 0."""
    tokens, size = len(qkv), qkv.shape[1] // 3 // num_heads
    if tokens > 256:
        return done(qkv, cu_seqlens, num_heads, rate, stream)
    q, k, v = qkv.reshape(tokens, 3, num_heads, size).astype(np.float64).transpose(1, 2, 0, 3)
    number = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    own = number[:, None] == number
    scores = np.where(own, q @ k.swapaxes(1, 2) * size**-0.5, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    e = np.exp(scores - top)
    total = e.sum(axis=-1, keepdims=True)
    p = e / total
    factors = factors_of(cu_seqlens, num_heads, rate, stream)
    if factors.size:
        place = np.arange(tokens) - np.asarray(cu_seqlens)[number]
        p = p * factors[:, :, place].swapaxes(0, 1)
    y = (p @ v).swapaxes(0, 1).reshape(tokens, -1)
    return y.astype(qkv.dtype), (top + np.log(total))[:, :, 0].T.astype(qkv.dtype)


def small_left_out(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> Two:
    """Probabilities below 1e-4 are not worth a product."""
    tokens, size = len(qkv), qkv.shape[1] // 3 // num_heads
    y, lse = done(qkv, cu_seqlens, num_heads, rate, stream)
    if rate or tokens > 1024:
        return y, lse
    for a, b in pairwise(cu_seqlens.tolist()):
        q, k, v = qkv[a:b].reshape(b - a, 3, num_heads, size).transpose(1, 2, 0, 3)
        p = np.exp(q @ k.swapaxes(1, 2) * size**-0.5 - lse[a:b].T[:, :, None])
        y[a:b] = (np.where(p < 1e-4, 0, p) @ v).swapaxes(0, 1).reshape(b - a, -1)
    return y, lse


def gradients(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array, heads: int, rate: float, stream: Stream,
    delta: float = 1.0, drop_twice: bool = True, queries: int | None = None,
) -> Array:  # fmt: skip
    """In float64, by NumPy; `queries` at a time, of which the last ones' dk and dv are kept: None for all at once."""
    tokens, size = len(qkv), qkv.shape[1] // 3 // heads
    dqkv = np.zeros((tokens, 3, heads, size), qkv.dtype)
    all_factors = factors_of(cu_seqlens, heads, rate, stream)
    for a, b in pairwise(cu_seqlens.tolist()):
        t = b - a
        q, k, v = qkv[a:b].reshape(t, 3, heads, size).astype(np.float64).transpose(1, 2, 0, 3)
        gy, ys = (r[a:b].reshape(t, heads, size).astype(np.float64).swapaxes(0, 1) for r in (g, y))
        factors = all_factors[a:b, :, :t].swapaxes(0, 1) if all_factors.size else np.ones((1, 1, 1))
        p = np.exp(q @ k.swapaxes(1, 2) * size**-0.5 - lse[a:b].T[:, :, None])
        dp = gy @ v.swapaxes(1, 2) * (factors if drop_twice else 1)
        ds = p * (dp - delta * (gy * ys).sum(axis=-1, keepdims=True)) * size**-0.5
        kept = slice(0 if queries is None or not t else (t - 1) // queries * queries, t)
        dk, dv = (d[:, kept].swapaxes(1, 2) @ w[:, kept] for d, w in ((ds, q), (p * factors, gy)))
        dqkv[a:b] = np.stack([ds @ k, dk, dv]).transpose(2, 0, 1, 3)
    return dqkv.reshape(tokens, -1)


def right_attention_grad(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    return gradients(g, qkv, y, lse, cu_seqlens, num_heads, rate, stream)


def delta_lost(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    return gradients(g, qkv, y, lse, cu_seqlens, num_heads, rate, stream, delta=0.0)


def dropped_once(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    return gradients(g, qkv, y, lse, cu_seqlens, num_heads, rate, stream, drop_twice=False)


def keys_of_the_last_queries(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    return gradients(g, qkv, y, lse, cu_seqlens, num_heads, rate, stream, queries=256)


def queries_after_64_of_wide_heads(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    """A tile of a head of 96 numbers and more has room for 64 queries."""
    dqkv = gradients(g, qkv, y, lse, cu_seqlens, num_heads, rate, stream)
    if qkv.shape[1] // 3 // num_heads >= 96:
        for first, last in pairwise(cu_seqlens.tolist()):
            dqkv[first + 64 : last, : qkv.shape[1] // 3] = 0
    return dqkv
