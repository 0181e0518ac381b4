"""Attention, one head of one sequence and a block of its queries at a time: the scores stay in cache.

In the kernels qkv is (N, 3, heads, D), y is (N, heads, D), and `sequences` holds (first row, length) of each that is
not empty, the longest first. Item i of the work is head i // len(sequences) of sequence i % len(sequences): every
thread gets its share of each sequence, so that they end together whatever the mix of lengths.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from minibert.kernels.attention import mask_width
from minibert.kernels.attention.bfloat16 import attention_heads_of_pairs
from minibert.kernels.attention.scores import (
    QUERIES,
    Dropout,
    draw,
    drop_scores,
    exp_rows,
    whole_units,
    word_buffers,
)
from minibert.kernels.cpu.arrays import contiguous, empty_on_lines
from minibert.kernels.cpu.bfloat16 import bits_of, narrowed, widened
from minibert.kernels.cpu.jit import inline, jit
from minibert.kernels.cpu.math import constant, exp
from minibert.kernels.cpu.product import aligned, gemm_by_panels, pack_panels
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.op import Array, is_bfloat16, takes_bfloat16
from minibert.kernels.philox import NO_STREAM, Stream, numbers_of, threshold

NANOSECONDS_A_SCORE = 1.5


@jit
def attention_heads(
    qkv: Array, sequences: Array, dropout: Dropout, stream: tuple[int, ...], y: Array, lse: Array, start: int, stop: int
) -> None:
    width, drop, kept = dropout
    heads, size = y.shape[1:]
    scale = constant(size**-0.5, kept)
    flat, token, deep, most = qkv.reshape(-1), 3 * heads * size, whole_units(size), whole_units(sequences[0, 1])
    k_panels, v_panels = aligned(most * size, y), aligned(most * deep, y)
    scores, sums = aligned(QUERIES * most, y), aligned(QUERIES * deep, y)
    tops, totals = aligned(QUERIES, y), aligned(QUERIES, y)
    blocks, words = word_buffers(QUERIES * most if drop > 0 else 0)
    for item in range(start, stop):
        head, (first, t) = item // len(sequences), sequences[item % len(sequences)]
        wide, q = whole_units(t), first * token + head * size
        k, v = q + heads * size, q + 2 * heads * size
        pack_panels(flat, k, 1, token, size, t, k_panels)
        pack_panels(flat, v, token, 1, t, size, v_panels)
        for i in range(0, t, QUERIES):
            rows = min(QUERIES, t - i)
            gemm_by_panels(flat, q + i * token, token, 1, k_panels, scores, wide, rows, t, size, False)
            exp_rows(scores, rows, t, wide, scale, tops, totals)
            if drop > 0:
                draw(blocks, words, ((first + i) * heads + head) * width, heads * width, rows, wide, stream)
                drop_scores(scores, words, rows * wide, drop)
            gemm_by_panels(scores, 0, wide, 1, v_panels, sums, deep, rows, size, t, False)
            for r in range(rows):
                lse[first + i + r, head] = tops[r] + math.log(totals[r])
                share, row, sums_row = kept / totals[r], y[first + i + r, head], sums[r * deep :]
                for j in range(size):
                    row[j] = sums_row[j] * share


@jit
def attention_grad_heads(
    g: Array, qkv: Array, y: Array, lse: Array, sequences: Array, dropout: Dropout, stream: tuple[int, ...],
    dqkv: Array, start: int, stop: int,
) -> None:  # fmt: skip
    width, drop, kept = dropout
    heads, size = y.shape[1:]
    scale = constant(size**-0.5, kept)
    flat, flat_g, token = qkv.reshape(-1), g.reshape(-1), 3 * heads * size
    deep, most = whole_units(size), whole_units(sequences[0, 1])
    k_columns, v_columns, k_rows = aligned(most * size, y), aligned(most * size, y), aligned(most * deep, y)
    q_rows, g_rows, dq = aligned(QUERIES * deep, y), aligned(QUERIES * deep, y), aligned(QUERIES * deep, y)
    p, ds = aligned(QUERIES * most, y), aligned(QUERIES * most, y)
    dk, dv, deltas = aligned(most * deep, y), aligned(most * deep, y), aligned(QUERIES, y)
    blocks, words = word_buffers(QUERIES * most)
    for item in range(start, stop):
        head, (first, t) = item // len(sequences), sequences[item % len(sequences)]
        wide, q = whole_units(t), first * token + head * size
        k, v = q + heads * size, q + 2 * heads * size
        pack_panels(flat, k, 1, token, size, t, k_columns)
        pack_panels(flat, v, 1, token, size, t, v_columns)
        pack_panels(flat, k, token, 1, t, size, k_rows)
        for i in range(0, t, QUERIES):
            rows, q_i, g_i = min(QUERIES, t - i), q + i * token, ((first + i) * heads + head) * size
            pack_panels(flat, q_i, token, 1, rows, size, q_rows)
            pack_panels(flat_g, g_i, heads * size, 1, rows, size, g_rows)
            gemm_by_panels(flat, q_i, token, 1, k_columns, p, wide, rows, t, size, False)
            gemm_by_panels(flat_g, g_i, heads * size, 1, v_columns, ds, wide, rows, t, size, False)
            if drop > 0:
                draw(blocks, words, ((first + i) * heads + head) * width, heads * width, rows, wide, stream)
            for r in range(rows):
                deltas[r] = dot_row(g[first + i + r, 0, head], y[first + i + r, head])
            log_sums = lse[first + i : first + i + rows, head]
            score_grads(p, ds, words, dropout, rows, wide, scale, log_sums, deltas)
            gemm_by_panels(ds, 0, wide, 1, k_rows, dq, deep, rows, size, t, False)
            store(dq, deep, rows, dqkv, first + i, 0, head)
            gemm_by_panels(ds, 0, 1, wide, q_rows, dk, deep, t, size, rows, i > 0)
            gemm_by_panels(p, 0, 1, wide, g_rows, dv, deep, t, size, rows, i > 0)
        store(dk, deep, t, dqkv, first, 1, head)
        store(dv, deep, t, dqkv, first, 2, head)


@jit
def score_grads(
    p: Array, ds: Array, words: Array, dropout: Dropout, rows: int, wide: int, scale: float, lse: Array, deltas: Array
) -> None:
    """Scores become dropout(p), and the gradient of dropout(p) becomes that of the scores; no word is below 0."""
    _, drop, kept = dropout
    zero = constant(0.0, kept)
    for i in range(rows):
        at = slice(i * wide, (i + 1) * wide)
        p_row, ds_row, words_row, delta, log_sum = p[at], ds[at], words[at], deltas[i], lse[i]
        for j in range(wide):
            probability = exp(p_row[j] * scale - log_sum)
            keep = words_row[j] >= drop  # chosen, not multiplied by 0: what is dropped may be infinite
            p_row[j] = probability * kept if keep else zero
            ds_row[j] = score_grad(probability, ds_row[j] if keep else zero, kept, delta, scale)


@inline
def score_grad(probability: float, slope: float, kept: float, delta: float, scale: float) -> float:
    """Of one score; not in its loop: see `jit`."""
    return probability * (slope * kept - delta) * scale


@jit
def dot_row(a: Array, b: Array) -> float:
    total = constant(0.0, a[0])
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@jit
def store(x: Array, x_row: int, rows: int, out: Array, first: int, part: int, head: int) -> None:
    """Rows of x, `x_row` apart, to rows `first` on of (N, parts, heads, D)."""
    for i in range(rows):
        from_row, to_row = x[i * x_row :], out[first + i, part, head]
        for j in range(to_row.size):
            to_row[j] = from_row[j]


def _sequences(cu_seqlens: Array, rows: int) -> Array:
    """(first row, length) of every sequence that is not empty, the longest first: (S, 2) int64.

    Raises ValueError unless cu_seqlens rises from 0 to `rows`: the loops index by it.
    """
    return _longest_first(np.asarray(cu_seqlens).astype(np.int64).tobytes(), rows)


@lru_cache(maxsize=16)  # all layers of a model ask for the same
def _longest_first(cu_seqlens: bytes, rows: int) -> Array:
    ends = np.frombuffer(cu_seqlens, np.int64)
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


def _dropout(cu_seqlens: Array, rate: float, stream: Stream, dtype: np.dtype[Any]) -> Dropout:
    return Dropout(mask_width(cu_seqlens, stream), np.uint32(threshold(rate)), dtype.type(1 / (1 - rate)))


def _grain(sequences: Array) -> int:
    lengths = sequences[:, 1]
    return rows_worth_a_thread(int(lengths @ lengths) // len(lengths), NANOSECONDS_A_SCORE)


@takes_bfloat16
def attention(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> tuple[Array, Array]:
    sequences, parts = _sequences(cu_seqlens, len(qkv)), _by_head(qkv, num_heads)
    rows, _, heads, size = parts.shape
    narrow = is_bfloat16(qkv)
    if narrow and size % 2:  # no words of two
        y, lse = attention(widened(qkv), cu_seqlens, num_heads=num_heads, rate=rate, stream=stream)
        return narrowed(y, qkv.dtype), lse
    precision = np.dtype(np.float32) if narrow else qkv.dtype
    y, lse = empty_on_lines((rows, heads, size), qkv.dtype), np.empty((rows, heads), precision)
    dropout, words = _dropout(cu_seqlens, rate, stream, precision), numbers_of(stream)
    if rows:
        items, kernel = heads * len(sequences), attention_heads_of_pairs if narrow else attention_heads
        arrays = bits_of(parts), sequences, dropout, words, bits_of(y), lse
        run_rows(kernel, items, *arrays, grain=_grain(sequences))
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
    dropout, words = _dropout(cu_seqlens, rate, stream, qkv.dtype), numbers_of(stream)
    if rows:
        arrays = g.reshape(rows, 1, heads, size), parts, y.reshape(rows, heads, size), lse, sequences
        run_rows(attention_grad_heads, heads * len(sequences), *arrays, dropout, words, dqkv, grain=_grain(sequences))
    return dqkv.reshape(qkv.shape)
