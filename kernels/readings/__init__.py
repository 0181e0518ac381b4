"""Other readings of a formula: its error bound, where it cannot round, its exact derivative, its
cost. None of them is written per op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.op import Array, Op, holds_floats, outputs
from minibert.kernels.readings.bounded import bounded_module
from minibert.kernels.readings.counted import Cost, cost
from minibert.kernels.readings.dual import Dual, dual_module
from minibert.kernels.readings.exact import exact_module
from minibert.kernels.readings.precisions import PRECISIONS

__all__ = ["PRECISIONS", "Bound", "Cost", "bound", "bounded_module", "cost", "dual_module", "exact", "jvp"]


class Bound(NamedTuple):
    """What the float64 formula says of one output, and how far from it an evaluation may end."""

    value: np.ndarray  # float64
    error: np.ndarray  # the hard bound on |computed - value|
    terms: np.ndarray  # S: the sum of the absolute values of the terms that were added on the way
    dtype: str  # in which it is stored


def bound(
    op: Op, *arrays: Array, precision: str = "float32", storage: str | None = None, products: str = "float32",
    **params: Any,
) -> list[Bound]:  # fmt: skip
    """The outputs of `op` in float64, each with its bound for an evaluation in `precision`.

    `storage` (float16, bfloat16) adds the rounding of what is computed in `precision` and stored in fewer bits: every
    output but the op's `wide_outputs`, and what its formula calls `stored`. Float arrays are read as they are, already
    rounded to what the backend sees. `products` "tf32": on tensor cores, which round their operands.
    """
    module = bounded_module(precision, storage, products)
    bounds = []
    for k, result in enumerate(_read(op, module, arrays, params)):
        wide = storage is None or k in op.wide_outputs
        kept = result if wide else module.stored(result)
        bounds.append(Bound(kept.value, kept.error, kept.terms, precision if wide else str(storage)))
    return bounds


def exact(
    op: Op, *arrays: Array, precision: str = "float32", storage: str | None = None, products: str = "float32",
    **params: Any,
) -> list[np.ndarray]:  # fmt: skip
    """For each output of `op`, which of its elements every order of evaluation gives to the last bit.

    Arguments as of `bound`.
    """
    module = exact_module(precision, storage, products)
    masks = []
    for k, result in enumerate(_read(op, module, arrays, params)):
        kept = result if k in op.wide_outputs else module.stored(result)
        masks.append(kept.within(PRECISIONS[precision].roundoff))
    return masks


def _read(op: Op, module: Any, arrays: Sequence[Array], params: Mapping[str, Any]) -> list[Any]:
    """The outputs of the formula as one reading has them."""
    lift = module.reading.lift
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        results = op.formula(module, *(lift(a) if holds_floats(a) else a for a in map(np.asarray, arrays)), **params)
        return [lift(result) for result in outputs(results)]


def jvp(op: Op, arrays: tuple[Array, ...], tangents: tuple[Array | None, ...], **params: Any) -> np.ndarray:
    """The derivative of the first output along `tangents` (None: held fixed), exactly, in float64."""
    duals = [
        Dual(np.asarray(a, np.float64), np.asarray(t, np.float64)) if t is not None else _fixed(a)
        for a, t in zip(arrays, tangents, strict=True)
    ]
    return Dual.lift(outputs(op.formula(dual_module, *duals, **params))[0]).tangent


def _fixed(array: Array) -> Any:
    return Dual.lift(array) if holds_floats(np.asarray(array)) else array
