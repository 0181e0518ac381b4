"""Philox4x32-10: the same random words on every backend, for any thread count.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A stream is named by four
numbers (seed, stream, step, layer); its element i is word i % 4 of the block whose key is (seed, stream) and whose
counter is (i // 4, layer, step, 0). NumPy's own Philox is 4x64 and CuPy's is seeded otherwise: neither serves for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any  # as `kernels.op` says, which draws from here

ROUNDS = 10
MULTIPLY_0, MULTIPLY_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


class Stream(NamedTuple):
    """The name of one stream of random words; each field is an unsigned 32-bit number."""

    seed: int = 0
    stream: int = 0
    step: int = 0
    layer: int = 0


NO_STREAM = Stream()  # where nothing is drawn


class StreamFrom(Stream):
    """A stream from one of its blocks of four words on: what a part of a batch draws is what it draws in the whole.

    It unpacks to the four numbers: a kernel that asks `first_block` and `numbers_of` too heeds the rest.
    """

    block: int = 0  # the first
    width: int = 0  # words that a query and head own in the whole (`minibert.kernels.attention`), for attention alone

    @classmethod
    def of(cls, stream: Stream, block: int, width: int = 0) -> StreamFrom:
        part = cls(*stream)
        part.block, part.width = block, width
        return part


def first_block(stream: Stream | tuple[int, ...]) -> int:
    """Where a stream begins, in blocks of four words."""
    return getattr(stream, "block", 0)


def numbers_of(stream: Stream | tuple[Any, ...]) -> tuple[int, ...]:
    """The four numbers and the first block, as compiled code takes them."""
    return (*(int(number) for number in Stream(*stream)), first_block(stream))


def philox4x32(xp: Any, counter: tuple[Array, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Ten rounds on four counters (uint64 arrays that hold 32-bit words), under a key of two words."""
    c0, c1, c2, c3 = (xp.asarray(c, dtype=xp.uint64) for c in counter)
    k0, k1 = key
    low, shift = xp.uint64(MASK), xp.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = c0 * xp.uint64(MULTIPLY_0), c2 * xp.uint64(MULTIPLY_1)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ xp.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ xp.uint64(k1), p0 & low
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def random_words(stream: Stream | tuple[int, ...], count: int, xp: Any = np, start: int = 0) -> Array:
    """Elements `start` .. `start + count` of a stream: (count,) uint32."""
    seed, number, step, layer = Stream(*stream)
    start += 4 * first_block(stream)
    first, last = start // 4, -(-(start + count) // 4)
    block = xp.arange(first, last, dtype=xp.uint64)
    words = philox4x32(
        xp, (block, xp.full_like(block, layer), xp.full_like(block, step), xp.zeros_like(block)), (seed, number)
    )
    return xp.stack(words, axis=1).reshape(-1)[start - 4 * first :][:count].astype(xp.uint32)


def threshold(rate: float) -> int:
    """The integer below which a word means "drop": P(word < threshold) = rate, to 2^-32."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must lie in [0, 1), got {rate}")
    return round(rate * 2**32)


def keep_mask(xp: Any, stream: Stream | tuple[int, ...], shape: tuple[int, ...], rate: float) -> Array:
    """True with probability 1 - rate, by integer comparison: the same bits everywhere."""
    count = int(np.prod(shape))
    return (random_words(stream, count, xp) >= xp.uint32(threshold(rate))).reshape(shape)
