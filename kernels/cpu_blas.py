"""Products by NumPy's BLAS, straight into memory that is there already; cut into panels where bits must not vary.

OpenBLAS divides a product among its threads, and with the division the bits of some sums change. So in the
deterministic mode it has one thread (`backends.set_deterministic` sees to that), and a product is cut into panels by
its shape alone, which the threads of `cpu_threads` take as they come free.

Every panel packs the whole other operand anew. Panels of these sizes cost 0 to 4 % on two threads, measured against
OpenBLAS's own division of MiniLM's products; half of them, 8 %. There are 2, 4, 8 or 16, so that 2, 4, 8 or 16 threads
end together.
"""

from __future__ import annotations

import numpy as np

from minibert.kernels.cpu_threads import blocks, rows_worth_a_thread, run_rows
from minibert.kernels.determinism import deterministic
from minibert.kernels.op import Array

LEAST_ROWS, LEAST_COLUMNS = 256, 192  # of a panel
MOST_PANELS = 16
UNIT = 16  # rows or columns that BLAS's innermost loop takes at once, or a multiple of that
COST = 0.01  # nanoseconds that one core takes for a multiplication and addition


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
    if not deterministic():
        return np.matmul(a, b, out=out)
    by_columns, size = _panels(a, b)
    axis = 1 if by_columns else 0
    grain = rows_worth_a_thread(size * out.shape[1 - axis] * a.shape[1], COST)
    kernel = _column_panels if by_columns else _row_panels
    run_rows(kernel, blocks(out.shape[axis], size), a, b, out, size, np.geterr(), grain=grain)
    return out


def _panels(a: Array, b: Array) -> tuple[bool, int]:
    """Whether to cut a @ b by columns, and how many of them, else rows, to a panel: by shapes and layouts alone."""
    rows, columns = a.shape[0], b.shape[1]
    by_rows, by_columns = _power_of_two(rows // LEAST_ROWS), _power_of_two(columns // LEAST_COLUMNS)
    # a transposed matrix takes longer to pack: not again for each panel of rows
    transposed = b.strides[0] < b.strides[1]
    if by_columns > 1 and (transposed or by_rows == 1 or columns > rows):
        return True, _rounded_up(blocks(columns, by_columns))
    return False, _rounded_up(blocks(rows, by_rows))


def _power_of_two(number: int) -> int:
    """The highest that is not above `number`, from 1 to MOST_PANELS."""
    return min(MOST_PANELS, 1 << max(0, number.bit_length() - 1))


def _rounded_up(size: int) -> int:
    return max(1, blocks(size, UNIT)) * UNIT


def _row_panels(a: Array, b: Array, out: Array, size: int, errors: dict[str, str], start: int, stop: int) -> None:
    with np.errstate(**errors):  # type: ignore[arg-type]  # the caller's: every thread has its own
        for panel in range(start, stop):
            rows = slice(panel * size, (panel + 1) * size)
            np.matmul(a[rows], b, out=out[rows])


def _column_panels(a: Array, b: Array, out: Array, size: int, errors: dict[str, str], start: int, stop: int) -> None:
    with np.errstate(**errors):  # type: ignore[arg-type]
        for panel in range(start, stop):
            columns = slice(panel * size, (panel + 1) * size)
            np.matmul(a, b[:, columns], out=out[:, columns])
