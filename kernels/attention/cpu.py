"""Attention, one head of one sequence at a time: its scores stay in cache, its products are BLAS calls of this thread.

In the kernels qkv is (N, 3, heads, D), y is (N, heads, D), and `sequences` holds (first row, length) of each that is
not empty, the longest first. Item i of the work is head i // len(sequences) of sequence i % len(sequences): every
thread gets its share of each sequence, so that they end together whatever the mix of lengths.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.attention import mask_width
from minibert.kernels.cpu_arrays import contiguous
from minibert.kernels.cpu_math import constant, exp, philox_row, vmax
from minibert.kernels.cpu_threads import jit, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array
from minibert.kernels.philox import NO_STREAM, Stream, threshold

NANOSECONDS_A_SCORE = 2.0


class Dropout(NamedTuple):
    width: int  # words that a query and head own
    drop: np.uint32  # a score whose word is below this is dropped
    kept: Any  # the factor of the others, in the dtype of the arrays


@jit
def attention_heads(
    qkv: Array, sequences: Array, dropout: Dropout, stream: tuple[int, ...], y: Array, lse: Array, start: int, stop: int
) -> None:
    width, drop, kept = dropout
    heads, size = y.shape[1:]
    scale = constant(size**-0.5, kept)
    longest = sequences[0, 1]
    scratch, scores = np.empty((4, longest, size), y.dtype), np.empty(longest * longest, y.dtype)
    shares, words = np.empty(longest, y.dtype), np.empty(longest, np.uint32)
    for item in range(start, stop):
        head, (first, t) = item // len(sequences), sequences[item % len(sequences)]
        q, k, v, sums, p = scratch[0, :t], scratch[1, :t], scratch[2, :t], scratch[3, :t], scores[: t * t].reshape(t, t)
        for part, x in enumerate((q, k, v)):
            load(qkv[first : first + t], part, head, x)
        np.dot(q, k.T, p)
        for i in range(t):
            top, total = exp_row(p[i], scale)
            lse[first + i, head] = top + math.log(total)
            shares[i] = kept / total
            if drop > 0:
                philox_row(words, ((first + i) * heads + head) * width, t, *stream)
                drop_row(p[i], words, drop)
        np.dot(p, v, sums)
        for i in range(t):
            row = y[first + i, head]
            for j in range(size):
                row[j] = sums[i, j] * shares[i]


@jit
def attention_grad_heads(
    g: Array, qkv: Array, y: Array, lse: Array, sequences: Array, dropout: Dropout, stream: tuple[int, ...],
    dqkv: Array, start: int, stop: int,
) -> None:  # fmt: skip
    width, drop, kept = dropout
    heads, size = y.shape[1:]
    scale = constant(size**-0.5, kept)
    longest = sequences[0, 1]
    scratch, scores = np.empty((5, longest, size), y.dtype), np.empty((2, longest * longest), y.dtype)
    words = np.empty(longest, np.uint32)
    for item in range(start, stop):
        head, (first, t) = item // len(sequences), sequences[item % len(sequences)]
        q, k, v, gy, dx = scratch[0, :t], scratch[1, :t], scratch[2, :t], scratch[3, :t], scratch[4, :t]
        p, ds = scores[0, : t * t].reshape(t, t), scores[1, : t * t].reshape(t, t)
        for part, x in enumerate((q, k, v)):
            load(qkv[first : first + t], part, head, x)
        load(g[first : first + t], 0, head, gy)
        np.dot(q, k.T, p)
        np.dot(gy, v.T, ds)
        for i in range(t):
            if drop > 0:
                philox_row(words, ((first + i) * heads + head) * width, t, *stream)
            delta = dot_row(gy[i], y[first + i, head])
            score_grad_row(p[i], ds[i], words, drop, kept, scale, lse[first + i, head], delta)
        np.dot(ds, k, dx)
        store(dx, dqkv[first : first + t], 0, head)
        np.dot(ds.T, q, dx)
        store(dx, dqkv[first : first + t], 1, head)
        np.dot(p.T, gy, dx)
        store(dx, dqkv[first : first + t], 2, head)


@jit
def exp_row(row: Array, scale: float) -> tuple[float, float]:
    """Scores (t,) become exp(scale (score - top)); returns scale top, and their sum."""
    top = row[0]
    for j in range(row.size):
        top = vmax(top, row[j])
    total = constant(0.0, top)
    for j in range(row.size):
        e = exp((row[j] - top) * scale)
        row[j] = e
        total += e
    return top * scale, total


@jit
def drop_row(row: Array, words: Array, drop: np.uint32) -> None:
    zero = constant(0.0, row[0])
    for j in range(row.size):
        row[j] = row[j] if words[j] >= drop else zero


@jit
def score_grad_row(
    p: Array, ds: Array, words: Array, drop: np.uint32, kept: float, scale: float, lse: float, delta: float
) -> None:
    """Scores (t,) become dropout(p), and the gradient of dropout(p) becomes that of the scores; no word is below 0."""
    zero = constant(0.0, kept)
    for j in range(p.size):
        probability = exp(p[j] * scale - lse)
        share, slope = probability * kept, ds[j] * kept
        keep = words[j] >= drop  # chosen, not multiplied by 0: what is dropped may be infinite
        p[j] = share if keep else zero
        ds[j] = probability * ((slope if keep else zero) - delta) * scale


@jit
def dot_row(a: Array, b: Array) -> float:
    total = constant(0.0, a[0])
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@jit
def load(x: Array, part: int, head: int, out: Array) -> None:
    """(t, parts, heads, D) -> (t, D)."""
    for i in range(len(out)):
        row = x[i, part, head]
        for j in range(row.size):
            out[i, j] = row[j]


@jit
def store(x: Array, out: Array, part: int, head: int) -> None:
    """(t, D) -> (t, parts, heads, D)."""
    for i in range(len(x)):
        row = out[i, part, head]
        for j in range(row.size):
            row[j] = x[i, j]


def _sequences(cu_seqlens: Array, rows: int) -> Array:
    """(first row, length) of every sequence that is not empty, the longest first: (S, 2) int64.

    Raises ValueError unless cu_seqlens rises from 0 to `rows`: the loops index by it.
    """
    ends = np.asarray(cu_seqlens).astype(np.int64).reshape(-1)
    lengths = np.diff(ends)
    if ends.size == 0 or ends[0] != 0 or ends[-1] != rows or (lengths < 0).any():
        got = np.array2string(ends, threshold=10)
        raise ValueError(f"cu_seqlens must rise from 0 to the {rows} rows of qkv, got {got}")
    order = np.argsort(-lengths, kind="stable")
    both = np.stack([ends[:-1], lengths], axis=1)[order]
    return np.ascontiguousarray(both[both[:, 1] > 0])


def _by_head(qkv: Array, heads: int) -> Array:
    """(N, 3C) -> (N, 3, heads, D)."""
    rows, columns = qkv.shape
    if heads < 1 or columns == 0 or columns % (3 * heads):
        raise ValueError(f"qkv {qkv.shape} does not split into q, k and v of {heads} heads")
    return np.ascontiguousarray(qkv).reshape(rows, 3, heads, columns // (3 * heads))


def _dropout(cu_seqlens: Array, rate: float, dtype: np.dtype[Any]) -> Dropout:
    return Dropout(mask_width(cu_seqlens), np.uint32(threshold(rate)), dtype.type(1 / (1 - rate)))


def _grain(sequences: Array) -> int:
    return rows_worth_a_thread(round((sequences[:, 1].astype(float) ** 2).mean()), NANOSECONDS_A_SCORE)


def attention(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> tuple[Array, Array]:
    sequences, parts = _sequences(cu_seqlens, len(qkv)), _by_head(qkv, num_heads)
    rows, _, heads, size = parts.shape
    y, lse = np.empty((rows, heads, size), qkv.dtype), np.empty((rows, heads), qkv.dtype)
    dropout, words = _dropout(cu_seqlens, rate, qkv.dtype), tuple(map(int, Stream(*stream)))
    if rows:
        items = heads * len(sequences)
        run_rows(attention_heads, items, parts, sequences, dropout, words, y, lse, grain=_grain(sequences))
    return y.reshape(rows, heads * size), lse


def attention_grad(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    sequences, parts = _sequences(cu_seqlens, len(qkv)), _by_head(qkv, num_heads)
    rows, _, heads, size = parts.shape
    g, y = (contiguous(x, (rows, heads * size), name) for x, name in ((g, "g"), (y, "y")))
    lse = contiguous(lse, (rows, heads), "log sum exp")
    dqkv = np.empty(parts.shape, qkv.dtype)
    dropout, words = _dropout(cu_seqlens, rate, qkv.dtype), tuple(map(int, Stream(*stream)))
    if rows:
        arrays = g.reshape(rows, 1, heads, size), parts, y.reshape(rows, heads, size), lse, sequences
        run_rows(attention_grad_heads, heads * len(sequences), *arrays, dropout, words, dqkv, grain=_grain(sequences))
    return dqkv.reshape(qkv.shape)
