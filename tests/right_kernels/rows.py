"""Gathering, scattering and dropping, made otherwise than the formula."""

import numpy as np
from numba import njit

from minibert.kernels.philox import keep_mask, random_words, threshold


def gather_by_masks(x, index, *, skip=None):
    """For each row of the table, the places that ask for it."""
    out = np.zeros((len(index), x.shape[1]), x.dtype)
    for row in np.unique(index):
        if row != skip:
            out[index == row] = x[row]
    return out


@njit
def _gather(x, index, skip, out):
    for n in range(len(index)):
        for c in range(x.shape[1]):
            out[n, c] = 0 if index[n] == skip else x[index[n], c]


def gather_in_loops(x, index, *, skip=None):
    """Row by row."""
    out = np.empty((len(index), x.shape[1]), x.dtype)
    _gather(np.ascontiguousarray(x), np.ascontiguousarray(index), -1 if skip is None else skip, out)
    return out


@njit
def _scatter(x, index, skip, out):
    out[:] = 0
    for n in range(len(index)):
        if index[n] != skip:
            for c in range(x.shape[1]):
                out[index[n], c] += x[n, c]


def scatter_in_order(x, index, *, num_rows, skip=None):
    """As the rows come, a float32 accumulator for each element."""
    out = np.empty((num_rows, x.shape[1]), x.dtype)
    _scatter(np.ascontiguousarray(x), np.ascontiguousarray(index), -1 if skip is None else skip, out)
    return out


def scatter_by_bincount(x, index, *, num_rows, skip=None):
    """A histogram for each column, in float64, of the rows from last to first."""
    kept = np.flatnonzero(index != (-1 if skip is None else skip))[::-1]
    columns = [np.bincount(index[kept], x[kept, c], num_rows) for c in range(x.shape[1])]
    return np.stack(columns, axis=1).astype(x.dtype)


def scatter_by_sorting(x, index, *, num_rows, skip=None):
    """Sorted by row; the sum of each run by halves."""
    out = np.zeros((num_rows, x.shape[1]), x.dtype)
    order = np.argsort(index, kind="stable")
    ends = np.searchsorted(index[order], np.arange(num_rows + 1))
    for row in np.unique(index):
        if row != skip:
            run = x[order[ends[row] : ends[row + 1]]]
            while len(run) > 1:
                half = len(run) // 2
                run = np.concatenate([run[:half] + run[half : 2 * half], run[2 * half :]])
            out[row] = run[0]
    return out


def add_rows_at(total, x, index, *, skip=None):
    """Each row at once into the total, as index_add_ does."""
    kept = index != (-1 if skip is None else skip)
    np.add.at(total, index[kept], x[kept])


def add_rows_last(total, x, index, *, skip=None):
    """Summed by row in float64, then added."""
    total += scatter_by_bincount(x, index, num_rows=len(total), skip=skip)


def embedding_reversed(word, position, token_type, input_ids, position_ids, token_type_ids, *, padding_idx=None):
    """Type and position first, the word last."""
    return (token_type.take(token_type_ids, axis=0) + np.take(position, position_ids, axis=0)) + word[input_ids]


def embedding_wide(word, position, token_type, input_ids, position_ids, token_type_ids, *, padding_idx=None):
    """float64 inside, rounded once."""
    tables = ((word, input_ids), (position, position_ids), (token_type, token_type_ids))
    return sum(np.float64(table)[ids] for table, ids in tables).astype(word.dtype)


def dropout_by_division(x, *, rate, stream):
    """x / (1 - rate), in blocks of 1000 elements that draw their own words."""
    y = np.zeros(x.size, x.dtype)
    flat = x.reshape(-1)
    for i in range(0, x.size, 1000):
        some = flat[i : i + 1000]
        kept = random_words(stream, len(some), start=i) >= threshold(rate)
        y[i : i + 1000][kept] = some[kept] / x.dtype.type(1 - rate)
    return y.reshape(x.shape)


def dropout_masked(x, *, rate, stream):
    """A mask of 0 and 1 / (1 - rate), as a factor, as torch's native_dropout: what is dropped and not finite is NaN."""
    return x * (keep_mask(np, stream, x.shape, rate) * x.dtype.type(1 / (1 - rate)))
