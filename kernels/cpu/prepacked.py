"""Weights whose micropanels are kept: products by them pack nothing."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from minibert.kernels.cpu.product import PACKED, VECTORS, Operand, operand, pack_panels
from minibert.kernels.cpu.vectors import VECTOR_BYTES
from minibert.kernels.op import Array

# By the `id` of a weight: itself, for an id is given again to another, and its micropanels.
_kept: dict[int, tuple[weakref.ref[Array], Array]] = {}


def prepacked(weight: Array) -> Array:
    """A view of `weight` (out, in), with the micropanels of its transpose for as long as that lives.

    They are of its values now: who changes these takes a new one.
    """
    weight = weight.view()
    n, depth = weight.shape
    flat, k, column = operand(weight.T)
    lanes = VECTOR_BYTES // weight.itemsize
    panels = _aligned(VECTORS * lanes * -(-n // (VECTORS * lanes)) * depth, weight.dtype)
    pack_panels(flat, 0, k, column, depth, n, panels)
    key = id(weight)
    _kept[key] = weakref.ref(weight, lambda _: _kept.pop(key, None)), panels
    return weight


def transpose_of(weight: Array) -> Operand:
    """Its transpose (in, out), as `gemm` takes it: packed, if `prepacked` gave this very array."""
    kept, depth = _kept.get(id(weight)), weight.shape[1]
    if kept is None or kept[0]() is not weight:
        return operand(weight.T)
    return Operand(kept[1], PACKED, depth)


def _aligned(count: int, dtype: np.dtype[Any]) -> Array:
    buffer = np.empty(count + VECTOR_BYTES // dtype.itemsize, dtype)
    return buffer[-(buffer.ctypes.data // dtype.itemsize) % (VECTOR_BYTES // dtype.itemsize) :][:count]
