"""Arrays that lie in memory one after the other are one array: parts of an optimiser's flat memory, say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from minibert.kernels.op import Array


def adjoining(arrays: Sequence[Array | None]) -> np.ndarray | None:
    """(n_i, ...) -> (sum of n_i, ...), a view of NumPy arrays that follow one another without a gap; else None."""
    parts = [a for a in arrays if isinstance(a, np.ndarray) and a.ndim > 0]
    if not parts or len(parts) < len(arrays):
        return None
    first, whole = parts[0], _owner(parts[0])
    for a, b in pairwise(parts):
        follows = b.ctypes.data == a.ctypes.data + a.nbytes and b.shape[1:] == a.shape[1:] and b.dtype == a.dtype
        if not (follows and _owner(b) is whole):
            return None
    if whole.dtype != first.dtype or not all(a.flags.c_contiguous and a.flags.writeable for a in (whole, *parts)):
        return None
    start = (first.ctypes.data - whole.ctypes.data) // first.itemsize
    flat = whole.reshape(-1)[start : start + sum(a.size for a in parts)]
    return flat.reshape(-1, *first.shape[1:]) if flat.size else None


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
