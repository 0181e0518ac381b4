"""The OpenBLAS of NumPy's and SciPy's wheels: whose kernels it took, and how many threads it may use."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from minibert.kernels.determinism import deterministic, switch

SYMBOLS = {"numpy": "scipy_openblas_{}64_", "scipy": "scipy_openblas_{}"}


@cache
def _function(package: str, verb: str) -> Any:
    """`openblas_get_num_threads`, say, of that wheel's copy; None where it has no copy."""
    folder = Path(str(import_module(package).__file__)).parents[1] / f"{package}.libs"
    for path in sorted(folder.glob("libscipy_openblas*")):
        function = getattr(ctypes.CDLL(str(path)), SYMBOLS[package].format(verb), None)
        if function is not None:
            return function
    return None


def blas_threads(package: str) -> int | None:
    """Threads that `package`'s products use; None where its BLAS is not the OpenBLAS of its wheel."""
    get = _function(package, "get_num_threads")
    return None if get is None else int(get())


def set_blas_threads(package: str, count: int) -> None:
    set_threads = _function(package, "set_num_threads")
    if set_threads is not None:
        set_threads(count)


_given: int | None = None  # threads for NumPy's products, which get one of them while the deterministic mode is on


def product_threads() -> int:
    """Threads that NumPy's products were given."""
    return (_given if deterministic() else blas_threads("numpy")) or 1


def set_product_threads(count: int) -> None:
    """Give NumPy's products `count` threads; in the deterministic mode, from when it ends."""
    global _given
    _given = count
    set_blas_threads("numpy", 1 if deterministic() else count)


def set_deterministic(on: bool) -> None:
    """Hold NumPy's BLAS to one thread, since its bits depend on their number, or give it back those it had."""
    global _given
    if on == deterministic():
        return
    if on:
        _given = blas_threads("numpy")
    switch(on)
    set_blas_threads("numpy", 1 if on else _given or 1)


def blas_kernels(package: str) -> str:
    """The processor whose kernels `package`'s OpenBLAS chose, as `SkylakeX`; "unknown" where it is another BLAS."""
    name = _function(package, "get_corename")
    if name is None:
        return "unknown"
    name.restype = ctypes.c_char_p
    return str(name().decode())


def described() -> str:
    """NumPy and its BLAS, in a few words."""
    version = import_module("numpy").__version__
    threads = blas_threads("numpy") or "unknown"
    mode = ", deterministic" if deterministic() else ""
    return f"NumPy {version} (BLAS kernels {blas_kernels('numpy')}, BLAS threads {threads}{mode})"
