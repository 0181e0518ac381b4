"""Numba: the loops of `kernels/*/cpu.py`, compiled for this CPU."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager
from typing import Any

import numba
import numpy as np

from minibert.backends.base import Backend
from minibert.backends.blas import deterministic, set_product_threads
from minibert.kernels.array_module import numpy_module
from minibert.kernels.cpu import threads as cpu_threads
from minibert.kernels.cpu.bfloat16 import narrowed, widened
from minibert.kernels.cpu.prepacked import prepacked
from minibert.kernels.cpu.vectors import VECTOR_BYTES
from minibert.kernels.op import Array, is_bfloat16


class NumbaBackend(Backend):
    dtypes = ("float32", "float64", "bfloat16")

    def describe(self) -> str:
        mode = ", deterministic" if deterministic() else ""
        threads, bits = cpu_threads.num_threads(), 8 * VECTOR_BYTES
        return f"Numba {numba.__version__} ({threads} threads, vectors of {bits} bits{mode})"

    def widened(self, x: Array) -> Array:
        return widened(x) if is_bfloat16(x) else super().widened(x)

    def narrowed(self, x: Array, dtype: np.dtype[Any]) -> Array:
        return narrowed(x, dtype) if dtype.name == "bfloat16" else super().narrowed(x, dtype)

    def prepacked(self, weight: Array) -> Array:
        return prepacked(weight)

    def release_memory(self) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def finely_split(self) -> AbstractContextManager[None]:
        return cpu_threads.finely_split()

    def num_threads(self) -> int:
        return cpu_threads.num_threads()

    def set_num_threads(self, count: int) -> None:
        cpu_threads.set_num_threads(count)
        set_product_threads(count)


def recycle_memory() -> None:
    """Let glibc keep freed arrays for the next ones of their size instead of handing them back to the system.

    A step makes and drops the same arrays again and again; with mmap, each time every page of them faults anew.
    """
    if not sys.platform.startswith("linux"):
        return
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


recycle_memory()
backend = NumbaBackend("numba", numpy_module, kernel_files="cpu")
