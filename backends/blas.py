"""The OpenBLAS copies that the wheels of NumPy and SciPy bring, and how many threads each may use."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

SYMBOLS = {"numpy": "scipy_openblas_{}_num_threads64_", "scipy": "scipy_openblas_{}_num_threads"}


@cache
def _function(package: str, verb: str) -> Any:
    """`openblas_get_num_threads` or `openblas_set_num_threads` of that wheel's copy; None where it has no copy."""
    folder = Path(str(import_module(package).__file__)).parents[1] / f"{package}.libs"
    for path in sorted(folder.glob("libscipy_openblas*")):
        function = getattr(ctypes.CDLL(str(path)), SYMBOLS[package].format(verb), None)
        if function is not None:
            return function
    return None


def blas_threads(package: str) -> int | None:
    """Threads that `package`'s products use; None where its BLAS is not the OpenBLAS of its wheel."""
    get = _function(package, "get")
    return None if get is None else int(get())


def set_blas_threads(package: str, count: int) -> None:
    set_threads = _function(package, "set")
    if set_threads is not None:
        set_threads(count)
