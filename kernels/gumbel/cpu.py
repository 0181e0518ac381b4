"""gumbel: blocks of elements, each with the random words of its own places in the stream."""

from __future__ import annotations

import numpy as np

from minibert.kernels.cpu.arrays import flat
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import constant, log, philox_row
from minibert.kernels.cpu.threads import blocks, rows_worth_a_thread, run_rows
from minibert.kernels.gumbel import SPACING
from minibert.kernels.op import Array
from minibert.kernels.philox import Stream, numbers_of

BLOCK = 1024  # words at a time: 4 KiB, in the first-level cache
COST = 2.0  # nanoseconds an element, for `rows_worth_a_thread`
NINE, TWO, ONE = np.uint32(9), np.uint32(2), np.uint32(1)


@jit
def gumbel_blocks(x: Array, stream: tuple[int, ...], y: Array, start: int, stop: int) -> None:
    words = np.empty(BLOCK, np.uint32)
    for block in range(start, stop):
        first = block * BLOCK
        x_block, y_block = x[first : first + BLOCK], y[first : first + BLOCK]
        philox_row(words, first, x_block.size, *stream)
        for j in range(x_block.size):
            v = x.dtype.type((words[j] >> NINE) * TWO + ONE) * constant(SPACING, x_block[j])
            y_block[j] = x_block[j] - log(-log(v))


def gumbel(x: Array, *, stream: Stream) -> Array:
    y = np.empty(x.shape, x.dtype)
    (vector,) = flat(x)
    run_rows(
        gumbel_blocks, blocks(x.size, BLOCK), vector, numbers_of(stream), y.reshape(-1),
        grain=rows_worth_a_thread(BLOCK, COST),
    )  # fmt: skip
    return y
