"""The OpenBLAS of NumPy's wheel: whose kernels it took, and how many threads it may use."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def _function(verb: str) -> Any:
    """`openblas_get_num_threads`, say; None where NumPy has another BLAS."""
    folder = Path(str(np.__file__)).parents[1] / "numpy.libs"
    for path in sorted(folder.glob("libscipy_openblas*")):
        function = getattr(ctypes.CDLL(str(path)), f"scipy_openblas_{verb}64_", None)
        if function is not None:
            return function
    return None


def blas_threads() -> int | None:
    """Threads that NumPy's products use; None where its BLAS is not the OpenBLAS of its wheel."""
    get = _function("get_num_threads")
    return None if get is None else int(get())


def set_blas_threads(count: int) -> None:
    set_threads = _function("set_num_threads")
    if set_threads is not None:
        set_threads(count)


_deterministic = False
_given: int | None = None  # threads for NumPy's products, which get one of them while the deterministic mode is on


def deterministic() -> bool:
    """Whether results have the same bits whatever the number of threads, on every backend of the CPU."""
    return _deterministic


def product_threads() -> int:
    """Threads that NumPy's products were given."""
    return (_given if deterministic() else blas_threads()) or 1


def set_product_threads(count: int) -> None:
    """Give NumPy's products `count` threads; in the deterministic mode, from when it ends."""
    global _given
    _given = count
    set_blas_threads(1 if deterministic() else count)


def set_deterministic(on: bool) -> None:
    """Hold NumPy's BLAS to one thread, since its bits depend on their number, or give it back those it had."""
    global _deterministic, _given
    if on == _deterministic:
        return
    if on:
        _given = blas_threads()
    _deterministic = on
    set_blas_threads(1 if on else _given or 1)


def blas_kernels() -> str:
    """The processor whose kernels OpenBLAS chose, as `SkylakeX`; "unknown" where it is another BLAS."""
    name = _function("get_corename")
    if name is None:
        return "unknown"
    name.restype = ctypes.c_char_p
    return str(name().decode())


def described() -> str:
    """NumPy and its BLAS, in a few words."""
    threads = blas_threads() or "unknown"
    mode = ", deterministic" if deterministic() else ""
    return f"NumPy {np.__version__} (BLAS kernels {blas_kernels()}, BLAS threads {threads}{mode})"
