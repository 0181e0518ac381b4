"""dropout: blocks of elements, each with the random words of its own places in the stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.kernels.cpu.arrays import flat
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import philox_row
from minibert.kernels.cpu.threads import blocks, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array
from minibert.kernels.philox import Stream, numbers_of, threshold

BLOCK = 1024  # words at a time: 4 KiB, in the first-level cache
COST = 0.5  # nanoseconds an element, for `rows_worth_a_thread`


@jit
def dropout_blocks(x: Array, limit: Any, scale: Any, stream: tuple[int, ...], y: Array, start: int, stop: int) -> None:
    words = np.empty(BLOCK, np.uint32)
    zero = x.dtype.type(0)
    for block in range(start, stop):
        first = block * BLOCK
        x_block, y_block = x[first : first + BLOCK], y[first : first + BLOCK]
        philox_row(words, first, x_block.size, *stream)
        for j in range(x_block.size):
            y_block[j] = x_block[j] * scale if words[j] >= limit else zero


def dropout(x: Array, *, rate: float, stream: Stream) -> Array:
    limit = np.uint32(threshold(rate))
    if rate == 0:
        return x
    y = np.empty(x.shape, x.dtype)
    (vector,) = flat(x)
    scale = x.dtype.type(1 / (1 - rate))
    run_rows(
        dropout_blocks, blocks(x.size, BLOCK), vector, limit, scale, numbers_of(stream), y.reshape(-1),
        grain=rows_worth_a_thread(BLOCK, COST),
    )  # fmt: skip
    return y
