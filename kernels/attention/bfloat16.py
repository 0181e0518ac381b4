"""Attention of bfloat16 on a CPU: both products of pairs; between them the probabilities go to 16 bits, as is allowed.

In the kernel qkv is (N, 3, heads, D) and y (N, heads, D), of bits; words hold two elements, of D first, then of keys.
"""

from __future__ import annotations

import math

import numpy as np

from minibert.kernels.attention.scores import (
    QUERIES,
    Dropout,
    draw,
    drop_scores,
    exp_rows,
    whole_units,
    word_buffers,
)
from minibert.kernels.cpu.bfloat16 import interleave_rows, stored
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import constant
from minibert.kernels.cpu.product import aligned, ceil_div, gemm_by_panels, pack_panels
from minibert.kernels.op import Array


@jit
def attention_heads_of_pairs(
    qkv: Array, sequences: Array, dropout: Dropout, stream: tuple[int, ...], y: Array, lse: Array, start: int, stop: int
) -> None:
    """As `attention_heads`; D is even."""
    width, drop, kept = dropout
    heads, size = y.shape[1:]
    scale = constant(size**-0.5, kept)
    flat, token, deep, most = qkv.reshape(-1), 3 * heads * size, whole_units(size), whole_units(sequences[0, 1])
    words, word, half = flat.view(np.uint32), token // 2, size // 2
    k_panels, v_panels = aligned(most * half, words), aligned(most // 2 * deep, words)
    pairs = aligned(most // 2 * size, words)[: most // 2 * size]
    scores, sums = aligned(QUERIES * most, lse), aligned(QUERIES * deep, lse)
    p = aligned(QUERIES * most // 2, words)
    bits = p.view(np.uint16)
    tops, totals = aligned(QUERIES, lse), aligned(QUERIES, lse)
    blocks, random = word_buffers(QUERIES * most if drop > 0 else 0)
    for item in range(start, stop):
        head, (first, t) = item // len(sequences), sequences[item % len(sequences)]
        wide, depth = whole_units(t), ceil_div(t, 2)
        q = first * word + head * half
        pack_panels(words, q + heads * half, 1, word, half, t, k_panels)
        interleave_rows(flat[2 * q + 2 * heads * size :], token, size, t, pairs.reshape(-1, size), 0, depth)
        pack_panels(pairs, 0, size, 1, depth, size, v_panels)
        for i in range(0, t, QUERIES):
            rows = min(QUERIES, t - i)
            gemm_by_panels(words, q + i * word, word, 1, k_panels, scores, wide, rows, t, half, False)
            exp_rows(scores, rows, t, wide, scale, tops, totals)
            if drop > 0:
                draw(blocks, random, ((first + i) * heads + head) * width, heads * width, rows, wide, stream)
                drop_scores(scores, random, rows * wide, drop)
            for j in range(rows * wide):
                bits[j] = stored(scores[j], bits)
            for r in range(rows if t % 2 else 0):
                bits[r * wide + t] = 0  # beside the last key, in its word
            gemm_by_panels(p, 0, wide // 2, 1, v_panels, sums, deep, rows, size, depth, False)
            for r in range(rows):
                lse[first + i + r, head] = tops[r] + math.log(totals[r])
                share, row, sums_row = kept / totals[r], y[first + i + r, head], sums[r * deep :]
                for j in range(size):
                    row[j] = stored(sums_row[j] * share, row)
