"""embedding, gather_rows, scatter_rows, add_rows and dropout, wrong in the ways that `tests/faults/table.py` tells."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from minibert.kernels.philox import Stream, random_words, threshold

Array = np.ndarray[Any, Any]


@njit
def three_rows(word: Array, position: Array, kind: Array, ids: Array, positions: Array, kinds: Array) -> Array:
    y = np.empty((len(ids), word.shape[1]), word.dtype)
    for n in range(len(ids)):
        for j in range(word.shape[1]):
            y[n, j] = word[ids[n], j] + position[positions[n], j] + kind[kinds[n], j]
    return y


def embedded(word: Array, position: Array, kind: Array, ids: Array, positions: Array, kinds: Array) -> Array:
    tables = (np.ascontiguousarray(table) for table in (word, position, kind))
    y = three_rows(*tables, *(np.ascontiguousarray(i, np.int64).reshape(-1) for i in (ids, positions, kinds)))
    return y.reshape(*ids.shape, word.shape[1])


def right_embedding(
    word: Array, position: Array, kind: Array, ids: Array, positions: Array, kinds: Array,
    *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    return embedded(word, position, kind, ids, positions, kinds)


def ids_in_16_bits(
    word: Array, position: Array, kind: Array, ids: Array, positions: Array, kinds: Array,
    *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    return embedded(word, position, kind, ids.astype(np.uint16), positions, kinds)


def positions_up_to_512(
    word: Array, position: Array, kind: Array, ids: Array, positions: Array, kinds: Array,
    *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    return embedded(word, position, kind, ids, np.minimum(positions, 511), kinds)


def rows_of_packs_to_65535(
    word: Array, position: Array, kind: Array, ids: Array, positions: Array, kinds: Array,
    *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    positions = positions.copy()
    if word.shape[1] % 4 == 0:
        positions[65535:] = 0
    return embedded(word, position, kind, ids, positions, kinds)


def padding_is_zero(
    word: Array, position: Array, kind: Array, ids: Array, positions: Array, kinds: Array,
    *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    """The row of `padding_idx` gets no gradient: which does not make it zero."""
    y = embedded(word, position, kind, ids, positions, kinds)
    if padding_idx is not None:
        y[ids == padding_idx] -= word[padding_idx]
    return y


def right_gather_rows(x: Array, index: Array, *, skip: int | None = None) -> Array:
    y = x[index]
    if skip is not None:
        y[index == skip] = 0
    return y


def skipped_row_emptied(x: Array, index: Array, *, skip: int | None = None) -> Array:
    """What is to be left out is zeroed in the table."""
    if skip is not None:
        x[skip] = 0
    return x[index]


def skipped_times_zero(x: Array, index: Array, *, skip: int | None = None) -> Array:
    kept = np.ones(len(index), x.dtype) if skip is None else (index != skip).astype(x.dtype)
    return x[index] * kept[:, None]


@njit
def copied(x: Array, index: Array) -> Array:
    """The next number is read before the row of this one is copied."""
    y, following = np.empty((len(index), x.shape[1]), x.dtype), index[0]
    for k in range(len(index)):
        this, following = following, index[k + 1]
        for j in range(x.shape[1]):
            y[k, j] = x[this, j]
    return y


def reads_one_id_too_many(x: Array, index: Array, *, skip: int | None = None) -> Array:
    y = copied(np.ascontiguousarray(x), np.ascontiguousarray(index))
    if skip is not None:
        y[index == skip] = 0
    return y


@njit
def added(y: Array, x: Array, index: Array, skip: int, rows: int) -> None:
    """In float64, and the first `rows` of x."""
    total = np.zeros(y.shape, np.float64)
    for k in range(rows):
        if index[k] != skip:
            for j in range(x.shape[1]):
                total[index[k], j] += x[k, j]
    for i in range(len(y)):
        for j in range(y.shape[1]):
            y[i, j] += total[i, j]


def scattered(x: Array, index: Array, num_rows: int, skip: int | None, rows: int | None = None) -> Array:
    y = np.zeros((num_rows, x.shape[1]), x.dtype)
    count = len(index) if rows is None else rows
    added(y, np.ascontiguousarray(x), np.ascontiguousarray(index), -1 if skip is None else skip, count)
    return y


def right_scatter_rows(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    return scattered(x, index, num_rows, skip)


def last_one_wins(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    y = np.zeros((num_rows, x.shape[1]), x.dtype)
    y[index] = x
    if skip is not None:
        y[skip] = 0
    return y


def skip_of_0_is_none(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    return scattered(x, index, num_rows, skip if skip else None)


def skipped_up_to_3072_rows(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    return scattered(x, index, num_rows, skip if len(index) <= 3072 else None)


def last_4096_rows_lost(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    return scattered(x, index, num_rows, skip, len(index) // 4096 * 4096 or None)


def last_of_large_tables(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    y = scattered(x, index, num_rows, skip)
    if num_rows > 65536:
        y[-1] = 0
    return y


def added_in_half(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    y = np.zeros((num_rows, x.shape[1]), np.float16)
    kept = slice(None) if skip is None else index != skip
    np.add.at(y, index[kept], x[kept].astype(np.float16))
    return y.astype(x.dtype)


@njit
def placed(index: Array, slots: Array) -> Array:
    """The place of each id in a table of `slots`, found by trying one after the other."""
    places = np.empty(len(index), np.int64)
    for k in range(len(index)):
        place = index[k] % len(slots)
        while slots[place] != -1 and slots[place] != index[k]:
            place = (place + 1) % len(slots)
        slots[place] = index[k]
        places[k] = place
    return places


def table_of_1024_slots(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    """Where there are more ids than slots, a free one is sought for ever."""
    slots = np.full(1024, -1)
    places = placed(np.ascontiguousarray(index), slots)
    sums = scattered(x, places, len(slots), None)
    y, used = np.zeros((num_rows, x.shape[1]), x.dtype), np.flatnonzero(slots >= 0)
    y[slots[used]] = sums[used]
    if skip is not None:
        y[skip] = 0
    return y


@njit
def added_beyond(y: Array, x: Array, index: Array, skip: int) -> None:
    """What is skipped is added to a row behind the last one."""
    columns, flat = y.shape[1], y.reshape(-1)
    for k in range(len(index)):
        row = len(y) if index[k] == skip else index[k]
        for j in range(columns):
            flat[row * columns + j] += x[k, j]


def skipped_row_beyond(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    y = np.zeros((num_rows, x.shape[1]), x.dtype)
    added_beyond(y, np.ascontiguousarray(x), np.ascontiguousarray(index), -1 if skip is None else skip)
    return y


def right_add_rows(total: Array, x: Array, index: Array, *, skip: int | None = None) -> Array:
    plain = np.ascontiguousarray(total)
    added(plain, np.ascontiguousarray(x), np.ascontiguousarray(index), -1 if skip is None else skip, len(index))
    if plain is not total:
        total[...] = plain
    return total


def repeated_are_added_once(total: Array, x: Array, index: Array, *, skip: int | None = None) -> Array:
    """NumPy reads all rows before it writes one."""
    kept = slice(None) if skip is None else index != skip
    total[index[kept]] += x[kept]
    return total


def assigned(total: Array, x: Array, index: Array, *, skip: int | None = None) -> Array:
    total[...] = scattered(x, index, len(total), skip)
    return total


@njit
def kept_of(x: Array, words: Array, limit: int, scale: float) -> Array:
    y = np.empty(x.shape, x.dtype)
    for i in range(x.size):
        y[i] = x[i] * scale if words[i] >= limit else 0.0
    return y


def dropped(x: Array, rate: float, words: Array, scale: float | None = None) -> Array:
    factor = 1 / (1 - rate) if scale is None else scale
    flat = np.ascontiguousarray(x).reshape(-1)
    return kept_of(flat, words[: x.size], threshold(rate), x.dtype.type(factor)).reshape(x.shape)


def right_dropout(x: Array, *, rate: float, stream: Stream) -> Array:
    return dropped(x, rate, random_words(stream, x.size)) if rate else x


def scaled_by_the_rate(x: Array, *, rate: float, stream: Stream) -> Array:
    return dropped(x, rate, random_words(stream, x.size), 1 / rate) if rate else x


def seed_of_16_bits(x: Array, *, rate: float, stream: Stream) -> Array:
    seed, *others = stream
    return right_dropout(x, rate=rate, stream=Stream(seed & 0xFFFF, *others))


def places_in_16_bits(x: Array, *, rate: float, stream: Stream) -> Array:
    """From element 65536 on the words are those of the first again."""
    if not rate:
        return x
    return dropped(x, rate, np.resize(random_words(stream, min(x.size, 65536)), x.size))


def last_three_alike(x: Array, *, rate: float, stream: Stream) -> Array:
    """What is left over after whole blocks of 4 words gets the last block's first word."""
    if not rate:
        return x
    words = random_words(stream, x.size)
    words[x.size // 4 * 4 :] = words[x.size // 4 * 4 : x.size // 4 * 4 + 1]
    return dropped(x, rate, words)


def word_4_further(x: Array, *, rate: float, stream: Stream) -> Array:
    return dropped(x, rate, random_words(stream, x.size, start=4)) if rate else x


words_of: dict[tuple[int, float], Array] = {}


def words_remembered(x: Array, *, rate: float, stream: Stream) -> Array:
    """Drawn once for each size and rate: the next step drops what this one did."""
    if not rate:
        return x
    if (x.size, rate) not in words_of:
        words_of[x.size, rate] = random_words(stream, x.size)
    return dropped(x, rate, words_of[x.size, rate])
