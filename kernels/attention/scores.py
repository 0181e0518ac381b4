"""What attention does with a block of scores on a CPU, whatever its products are made of: exp, sums, dropout; scratch.

Scores lie in rows of `wide` elements, whole vectors: loops over all of a row leave no rest that runs one by one. What
stands beyond a sequence's length is in no result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import constant, exp, philox_block
from minibert.kernels.cpu.product import UNIT, ceil_div
from minibert.kernels.cpu.vectors import row_max, row_sum
from minibert.kernels.op import Array

QUERIES = 128  # in a block, at most; a multiple of the rows of a tile


class Dropout(NamedTuple):
    width: int  # words that a query and head own
    drop: np.uint32  # a score whose word is below this is dropped
    kept: Any  # the factor of the others, in the dtype of the arrays


@jit
def whole_units(count: int) -> int:
    return UNIT * ceil_div(count, UNIT)


@jit
def word_buffers(count: int) -> tuple[Array, Array]:
    """Scratch of `draw`: numbers of blocks, and their words."""
    return np.empty(count // 4, np.uint64), np.empty(count, np.uint32)


@jit
def draw(blocks: Array, words: Array, first: int, apart: int, rows: int, wide: int, stream: tuple[Any, ...]) -> None:
    """Rows of `wide` words, from elements first, first + apart, ... of the stream, multiples of 4, all in one loop."""
    count = wide // 4
    seed, number, step, layer, start = stream
    for i in range(rows):
        row, block = blocks[i * count : (i + 1) * count], start + (first + i * apart) // 4
        for j in range(count):
            row[j] = block + j
    seed, number, step, layer = np.uint64(seed), np.uint64(number), np.uint64(step), np.uint64(layer)
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    for i in range(np.uint64(rows * count)):  # unsigned: Numba adds no test for negative indices
        a, b, c, d = philox_block(blocks[i], layer, step, seed, number)
        place = four * i
        words[place], words[place + one] = np.uint32(a), np.uint32(b)
        words[place + two], words[place + three] = np.uint32(c), np.uint32(d)


@jit
def exp_rows(scores: Array, rows: int, t: int, wide: int, scale: float, tops: Array, totals: Array) -> None:
    """Scores become exp(scale (score - top of the row)); `tops` are scale top, and `totals` the rows' sums."""
    for i in range(rows):  # three loops: a maximum is long under way, and the next row's need not wait for it
        tops[i] = row_max(scores, i * wide, t)
    for i in range(rows):
        top, row = tops[i], scores[i * wide : (i + 1) * wide]
        for j in range(wide):
            row[j] = exp((row[j] - top) * scale)
    for i in range(rows):
        tops[i] *= scale
        totals[i] = row_sum(scores, i * wide, t)


@jit
def drop_scores(scores: Array, words: Array, count: int, drop: np.uint32) -> None:
    zero = constant(0.0, scores[0])
    for j in range(np.uint64(count)):
        scores[j] = scores[j] if words[j] >= drop else zero
