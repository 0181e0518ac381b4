"""Products by NumPy's BLAS, straight into memory that is there already; cut into panels where bits must not vary.

OpenBLAS divides a product by its number of threads, and with the division the order of some sums changes. So in the
deterministic mode it has one thread (whoever sets the mode sees to that: `backends.set_deterministic`), and a product
is cut into panels by its shape alone, which the threads of `cpu_threads` take as they come free.
"""

from __future__ import annotations

import numpy as np

from minibert.kernels.cpu_threads import blocks, run_rows
from minibert.kernels.op import Array

PANEL = 256  # rows or columns: each panel packs the other operand anew, and fewer leave threads without work

_deterministic = False


def deterministic() -> bool:
    """Whether products are cut by their shape alone."""
    return _deterministic


def set_deterministic(on: bool) -> None:
    """Cut products by their shape alone from now on. NumPy's BLAS must have one thread meanwhile."""
    global _deterministic
    _deterministic = bool(on)


def blas_ready(x: Array) -> Array:
    """`x`, copied where BLAS cannot read it (neither of its last two axes is contiguous): NumPy's own loop is slow."""
    if x.ndim < 2:
        return x
    (rows, columns), (down, across) = x.shape[-2:], x.strides[-2:]
    item = x.itemsize
    by_rows = across == item and down % item == 0 and down >= columns * item
    by_columns = down == item and across % item == 0 and across >= rows * item
    return x if by_rows or by_columns else np.ascontiguousarray(x)


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a (M, K) @ b (K, N) -> (M, N), row after row, written straight into `out` where that is given.

    `a` and `b` may be transposed or strided views; what BLAS cannot read is copied. `out` may be a view of a larger
    array, but its rows are contiguous, and it shares no memory with `a` and `b`.
    Raises ValueError where the shapes, or the shape, dtype or layout of `out`, do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"expected (M, K) and (K, N), got {a.shape} and {b.shape}")
    shape, dtype = (a.shape[0], b.shape[1]), np.result_type(a, b)
    if out is None:
        out = np.empty(shape, dtype)
    elif out.shape != shape or out.dtype != dtype or (out.size and out.strides[1] != out.itemsize):
        raise ValueError(
            f"out: expected {shape} {dtype} of contiguous rows, got {out.shape} {out.dtype} of strides {out.strides}"
        )
    a, b = blas_ready(a), blas_ready(b)
    if not _deterministic:
        return np.matmul(a, b, out=out)
    if out.shape[0] >= out.shape[1]:
        run_rows(_row_panels, blocks(out.shape[0], PANEL), a, b, out, np.geterr())
    else:
        run_rows(_column_panels, blocks(out.shape[1], PANEL), a, b, out, np.geterr())
    return out


def _row_panels(a: Array, b: Array, out: Array, errors: dict[str, str], start: int, stop: int) -> None:
    with np.errstate(**errors):  # type: ignore[arg-type]  # those of the caller: each thread has its own
        for panel in range(start, stop):
            rows = slice(panel * PANEL, (panel + 1) * PANEL)
            np.matmul(a[rows], b, out=out[rows])


def _column_panels(a: Array, b: Array, out: Array, errors: dict[str, str], start: int, stop: int) -> None:
    with np.errstate(**errors):  # type: ignore[arg-type]
        for panel in range(start, stop):
            columns = slice(panel * PANEL, (panel + 1) * PANEL)
            np.matmul(a, b[:, columns], out=out[:, columns])
