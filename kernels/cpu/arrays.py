"""What the wrappers of Numba kernels make sure of before a loop trusts it: layout, equal shapes, ids within range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LINE = 64  # bytes of a cache line: tiles whose rows lie across two are slow


def flat(*arrays: np.ndarray) -> list[np.ndarray]:
    """Each array as a contiguous vector, a copy where it is strided. Raises ValueError unless their shapes agree."""
    shapes = {np.shape(a) for a in arrays}
    if len(shapes) != 1:
        raise ValueError(f"expected arrays of one shape, got {', '.join(str(np.shape(a)) for a in arrays)}")
    return [np.ascontiguousarray(a).reshape(-1) for a in arrays]


def contiguous(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """`array` in C order, a copy where it is strided. Raises ValueError unless it has this shape."""
    if np.shape(array) != shape:
        raise ValueError(f"{name}: expected the shape {shape}, got {np.shape(array)}")
    return np.ascontiguousarray(array)


def row_numbers(ids: np.ndarray, rows: int, name: str) -> np.ndarray:
    """`ids` as a contiguous int64 vector. Raises ValueError unless each is a row of a table of `rows` rows."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected whole numbers, got {ids.dtype}")
    if ids.size and not (ids.min() >= 0 and ids.max() < rows):
        raise ValueError(f"{name}: expected numbers from 0 to {rows - 1}, got {ids.min()} to {ids.max()}")
    return np.ascontiguousarray(ids, np.int64).reshape(-1)


def empty_on_lines(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that nobody has written, at the beginning of a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + LINE, np.uint8)
    start = -buffer.ctypes.data % LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def on_lines(array: np.ndarray) -> np.ndarray:
    """`array`, whose rows are contiguous, or a copy whose rows begin at cache lines if its own could, and do not."""
    row = array.strides[0]
    if row % LINE or not array.ctypes.data % LINE:
        return array
    copy = empty_on_lines(array.shape, array.dtype)
    copy[...] = array
    return copy
