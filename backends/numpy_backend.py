"""NumPy: every op by its formula. The reference for all others."""

from __future__ import annotations

import numpy as np

from minibert.backends.base import Backend
from minibert.backends.blas import blas_threads, set_blas_threads
from minibert.kernels.array_module import numpy_module


class NumpyBackend(Backend):
    def describe(self) -> str:
        return f"NumPy {np.__version__}, BLAS threads {blas_threads('numpy') or 'unknown'}"

    def num_threads(self) -> int:
        return blas_threads("numpy") or 1

    def set_num_threads(self, count: int) -> None:
        set_blas_threads("numpy", count)


backend = NumpyBackend("numpy", numpy_module)
