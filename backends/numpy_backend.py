"""NumPy: every op by its formula. The reference for all others."""

from __future__ import annotations

from minibert.backends.base import Backend
from minibert.backends.blas import described, product_threads, set_product_threads
from minibert.kernels.array_module import numpy_module


class NumpyBackend(Backend):
    dtypes = ("float32", "float64", "float16", "bfloat16")

    def describe(self) -> str:
        return described()

    def num_threads(self) -> int:
        return product_threads()

    def set_num_threads(self, count: int) -> None:
        set_product_threads(count)


backend = NumpyBackend("numpy", numpy_module)
