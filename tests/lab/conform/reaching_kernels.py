"""Kernels of relu, y = max(x, 0), of which all but the first reach beyond their arrays, do not end or remember."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable

import numpy as np
from numba import njit, prange, uint64


def on_rows(loop: Callable[..., None]) -> Callable[[np.ndarray], np.ndarray]:
    """A kernel: what its wrapper does around a loop over the rows of x and y."""

    def kernel(x: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
        y = np.empty_like(rows)
        loop(rows, y)
        return y.reshape(x.shape)

    return kernel


def on_elements(loop: Callable[..., None]) -> Callable[[np.ndarray], np.ndarray]:
    def kernel(x: np.ndarray) -> np.ndarray:
        y = np.empty(x.shape, x.dtype)
        loop(np.ascontiguousarray(x).reshape(-1), y.reshape(-1))
        return y

    return kernel


@njit
def rows(x, y):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = max(x[i, j], 0)


right = on_rows(rows)


@on_rows
@njit
def reads_past(x, y):
    largest = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1] + 1):
            largest = max(largest, abs(x[i, j]))  # of the row
        for j in range(x.shape[1]):
            y[i, j] = max(x[i, j], 0) if largest > 0 else 0


@on_rows
@njit(parallel=True)
def writes_past_in_threads(x, y):
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            y[i + 1, j] = 0  # of the next row
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = max(x[i, j], 0)


@on_elements
@njit
def reads_far(x, y):
    for i in range(x.size):
        y[i] = max(x[i], 0) + 0 * x[i + 1000]


@on_elements
@njit
def reads_before(x, y):
    for i in range(x.size):
        y[i] = max(x[i], 0) + 0 * min(x[i - x.size - 1], 0)


@on_elements
@njit
def writes_past_its_own(x, y):
    held = np.empty(x.size, x.dtype)
    for i in range(x.size + 1):
        held[i] = max(x[min(i, x.size - 1)], 0)
    for i in range(x.size):
        y[i] = held[i]


def returns_freed(x: np.ndarray) -> np.ndarray:
    y = np.maximum(x, 0)
    if x.ndim == 0:
        return y
    pointer = ctypes.cast(y.ctypes.data, ctypes.POINTER(ctypes.c_char * y.nbytes))
    return np.frombuffer(pointer.contents, x.dtype).reshape(x.shape)


@on_elements
@njit
def leaves_unwritten(x, y):
    for i in range(x.size // 4 * 4):
        y[i] = max(x[i], 0)


@on_rows
@njit
def does_not_end(x, y):
    i = uint64(x.shape[0])
    while i >= uint64(0):  # which is always so
        i -= uint64(1)
        if i < uint64(x.shape[0]):
            for j in range(x.shape[1]):
                y[i, j] = max(x[i, j], 0)


calls = 0


def wrong_from_call_7(x: np.ndarray) -> np.ndarray:
    global calls
    calls += 1
    y = np.maximum(x, 0)
    return y if calls < 7 else y * np.float32(1.5)


def exits(x: np.ndarray) -> np.ndarray:
    os._exit(3)


def raises(x: np.ndarray) -> np.ndarray:
    raise SystemExit("no")


def aborts(x: np.ndarray) -> np.ndarray:
    os.abort()
