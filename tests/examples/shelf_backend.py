"""A third-party backend in one file: arrays that live elsewhere, a kernel of its own, and the formulas for the rest.

    pytest -p minibert.conformance --backend shelf_backend.py:ShelfBackend

"Elsewhere" is a class that wraps NumPy, so that the file runs anywhere. For a real device `asarray` and `numpy` copy to
it and back, and `synchronize` waits for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.backends import Backend
from minibert.kernels import Array, Op
from minibert.kernels.array_module import numpy_module

__version__ = "0.1"


class ShelfArray(np.ndarray):
    """The device's array type."""


def softmax(x: Array) -> Array:
    """exp(x - max x) / sum exp(x - max x) along the last axis."""
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return y


def softmax_grad(g: Array, y: Array) -> Array:
    """y (g - sum g y) along the last axis."""
    return y * (g - (g * y).sum(axis=-1, keepdims=True))


KERNELS = {"softmax": softmax, "softmax_grad": softmax_grad}


class ShelfBackend(Backend):
    """Kernels by the name of their op; an op without one runs by its formula, correct from the first day."""

    dtypes = ("float32", "float64")

    def __init__(self) -> None:
        super().__init__("shelf", numpy_module)

    def kernel(self, op: Op) -> Any:
        return self._kernels.get(op) or KERNELS.get(op.name)  # those that `using` put in first

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        return np.asarray(x, dtype=dtype).view(ShelfArray)

    def numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def describe(self) -> str:
        return f"arrays on a shelf, NumPy {np.__version__}"
