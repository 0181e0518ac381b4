"""where on arrays of one shape; other layouts NumPy broadcasts. (add, mul, scale: NumPy's own loops are as fast.)"""

from __future__ import annotations

import numpy as np

from minibert.kernels.cpu_arrays import flat
from minibert.kernels.cpu_threads import jit, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array

GRAIN = rows_worth_a_thread(1, cost=0.12)  # elements


@jit
def where_loop(condition, a, b, y, start, stop):  # type: ignore[no-untyped-def]
    condition, a, b, y = condition[start:stop], a[start:stop], b[start:stop], y[start:stop]
    for i in range(y.size):
        yes, no = a[i], b[i]  # both read first: else LLVM gathers, three times slower
        y[i] = yes if condition[i] else no


def where(condition: Array, a: Array, b: Array) -> Array:
    if not condition.shape == a.shape == b.shape:
        return np.where(condition, a, b)
    y = np.empty(a.shape, a.dtype)
    run_rows(where_loop, y.size, *flat(condition, a, b), y.reshape(-1), grain=GRAIN)
    return y
