"""The array module a formula is written against: NumPy, with the few things that BERT needs and NumPy lacks.

Formulas use these primitives and no others, so that whoever supplies another module gets another reading of them:
operators + - * / ** @ and comparisons, indexing, `.shape .ndim .size`, the methods `sum mean max reshape swapaxes
transpose`, the functions `exp log sqrt tanh erf rint maximum where concatenate broadcast_to segment_sum stored
as_floats integer_matmul`, and any function on integers. `stored(x)` is x: it marks what an implementation may keep in
memory on the way, where arrays in 16 bits lose digits. `as_floats(whole, like)` are integers in the dtype of `like`,
`integer_matmul(a, b)` a product of integers, exact while its sums stay below 2^53. `kernels/readings/reading.py` holds
the same list for the other readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minibert.kernels.adjoining import adjoining
from minibert.kernels.op import Array


class NumpyModule:
    """NumPy plus `erf` and the other functions that it has not; its `concatenate` copies nothing that it need not."""

    @staticmethod
    def erf(x: Array) -> Array:
        from scipy import special  # which takes as long to import as the rest of a command, and is seldom needed

        return special.erf(x)

    @staticmethod
    def stored(x: Array) -> Array:
        return x

    @staticmethod
    def as_floats(whole: Array, like: Array) -> Array:
        return whole.astype(like.dtype)

    @staticmethod
    def integer_matmul(a: Array, b: Array) -> Array:
        """In float64, for which there is BLAS."""
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)

    @staticmethod
    def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
        """A view where the arrays lie one after the other already, as weights do in an optimiser's flat memory."""
        whole = adjoining(arrays) if axis == 0 and len(arrays) > 1 else None
        return np.concatenate(arrays, axis=axis) if whole is None else whole

    @staticmethod
    def segment_sum(rows: Array, ids: Array, count: int) -> Array:
        """out[i] = sum of rows[k] over ids[k] == i; rows (N, ...) -> (count, ...). Sorted, so the order is fixed."""
        out = np.zeros((count, *rows.shape[1:]), rows.dtype)
        if len(ids):
            order = np.argsort(ids, kind="stable")
            present, starts = np.unique(ids[order], return_index=True)
            out[present] = np.add.reduceat(rows[order], starts, axis=0)
        return out

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        setattr(self, name, found)  # found at once from now on: every op asks for some
        return found


numpy_module = NumpyModule()
