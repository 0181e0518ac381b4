"""A kernel for the CPU: pytest -p minibert.conformance --kernel row_softmax.py:softmax=softmax"""

import math

import numpy as np
from numba import njit


@njit
def rows(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(len(x)):
        top = x[i].max() if x.shape[1] else x.dtype.type(0)
        for j in range(x.shape[1]):
            y[i, j] = math.exp(x[i, j] - top)
        y[i] /= y[i].sum()


def softmax(x: np.ndarray) -> np.ndarray:
    y = np.empty(x.shape, x.dtype)
    rows(x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1]))
    return y
