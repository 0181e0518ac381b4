"""Weights whose micropanels are kept: products by them pack nothing. Those of int8 and bfloat16 are words."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.cpu.arrays import empty_on_lines
from minibert.kernels.cpu.product import PACKED, VECTORS, Operand, operand, pack_panels
from minibert.kernels.cpu.vectors import VECTOR_BYTES
from minibert.kernels.op import Array, is_bfloat16

BYTES, PAIRS = np.dtype(np.int32), np.dtype(np.uint32)  # words: see `cpu_vectors`


class Kept(NamedTuple):
    weight: weakref.ref[Array]  # itself, for an id is given again to another
    panels: Array
    row_sums: Array | None  # of a weight of int8


_kept: dict[int, Kept] = {}  # by the `id` of a weight


def prepacked(weight: Array) -> Array:
    """A view of `weight` (out, in), with the micropanels of its transpose for as long as that lives.

    They are of its values now: who changes these takes a new one.
    """
    weight = weight.view()
    (flat, k, column), n, depth = _transposed(weight), len(weight), _depth(weight)
    lanes = VECTOR_BYTES // flat.itemsize
    panels = empty_on_lines((VECTORS * lanes * -(-n // (VECTORS * lanes)) * depth,), flat.dtype)
    pack_panels(flat, 0, k, column, depth, n, panels)
    key, row_sums = id(weight), _row_sums(weight) if weight.dtype == np.int8 else None
    _kept[key] = Kept(weakref.ref(weight, lambda _: _kept.pop(key, None)), panels, row_sums)
    return weight


def transpose_of(weight: Array) -> Operand:
    """Its transpose (in, out), as `gemm` takes it: packed, if `prepacked` gave this very array."""
    kept = _found(weight)
    return _transposed(weight) if kept is None else Operand(kept.panels, PACKED, _depth(weight))


def row_sums_of(weight: Array) -> Array:
    """(out,) int32 sums of the rows of a weight of int8."""
    kept = _found(weight)
    return _row_sums(weight) if kept is None or kept.row_sums is None else kept.row_sums


def words_of(x: Array) -> Array:
    """Rows of int8 or bfloat16 as rows of words, filled up with zeros to whole ones."""
    word = _word(x)
    missing = -x.shape[1] % (word.itemsize // x.itemsize)
    x = np.pad(x, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(x)
    return x.reshape(-1).view(word).reshape(len(x), -1)


def _found(weight: Array) -> Kept | None:
    kept = _kept.get(id(weight))
    return None if kept is None or kept.weight() is not weight else kept


def _transposed(weight: Array) -> Operand:
    return operand((weight if _word(weight) == weight.dtype else words_of(weight)).T)


def _depth(weight: Array) -> int:
    """Rows of the transpose."""
    return -(-weight.shape[1] * weight.itemsize // _word(weight).itemsize)


def _word(x: Array) -> np.dtype[Any]:
    """The dtype in which products take an array: words, or its own."""
    return BYTES if x.itemsize == 1 else PAIRS if is_bfloat16(x) else x.dtype


def _row_sums(weight: Array) -> Array:
    return weight.sum(axis=1, dtype=np.int32)
