"""Other readings of a formula: its error bound, where it cannot round, its exact derivative, its
cost. None of them is written per op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.op import Array, Op, holds_floats, output_name, outputs
from minibert.kernels.readings.bounded import Bounded, bounded_module
from minibert.kernels.readings.counted import Cost, cost
from minibert.kernels.readings.dual import Dual, dual_module
from minibert.kernels.readings.exact import exact_module
from minibert.kernels.readings.precisions import PRECISIONS

__all__ = ["PRECISIONS", "Bound", "Cost", "bound", "bounded_module", "cost", "dual_module", "exact", "jvp"]


class Bound(NamedTuple):
    """What the float64 formula says of one output, and how far from it an evaluation may end."""

    value: np.ndarray  # float64
    error: np.ndarray  # the hard bound on |computed - value|
    likely: np.ndarray  # what it stays under in a sensible order of evaluation, on numbers as random as data are
    terms: np.ndarray  # S: the sum of the absolute values of the terms that were added on the way
    dtype: str  # in which it is stored
    name: str  # what the formula calls it


def bound(
    op: Op, *arrays: Array, precision: str = "float32", storage: str | None = None, products: str = "float32",
    **params: Any,
) -> list[Bound]:  # fmt: skip
    """The outputs of `op` in float64, each with its bound for an evaluation in `precision`.

    `storage` (float16, bfloat16) adds the rounding of what is computed in `precision` and stored in fewer bits: every
    output but the op's `wide_outputs`, and what its formula calls `stored`. Float arrays are read as they are, already
    rounded to what the backend sees; those that a forward op kept (`Op.kept`) may be made again by a kernel instead of
    read, so they carry what rounding may do to that. `products` "tf32": on tensor cores, which round their operands.
    """
    module = bounded_module(precision, storage, products)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        given = _lifted(module, arrays)
        for i, (made, is_kept) in _kept(op, module, given, params).items():
            given[i] = given[i].unless_made_again(made, is_kept)
        results = map(module.reading.lift, outputs(op.formula(module, *given, **params)))
    bounds = []
    for k, result in enumerate(results):
        wide = storage is None or k in op.wide_outputs or k in op.whole_outputs
        kept = result if wide else module.stored(result)
        if k in op.whole_outputs:
            kept = kept.if_finite()
        stored = op.whole_outputs.get(k, precision if wide else str(storage))
        bounds.append(Bound(kept.value, kept.error, kept.likely, kept.terms, stored, output_name(op, k)))
    return bounds


def exact(
    op: Op, *arrays: Array, precision: str = "float32", storage: str | None = None, products: str = "float32",
    **params: Any,
) -> list[np.ndarray]:  # fmt: skip
    """For each output of `op`, which of its elements every order of evaluation gives to the last bit.

    Arguments as of `bound`.
    """
    module, bounded = (make(precision, storage, products) for make in (exact_module, bounded_module))
    roundoff = PRECISIONS[precision].roundoff
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        given = _lifted(module, arrays)
        made = op.kept(module, *given, **params) if op.kept else {}
        for i, (_, is_kept) in _kept(op, bounded, _lifted(bounded, arrays), params).items():
            given[i] = given[i].unless(is_kept & ~made[i].within(roundoff))
        results = map(module.reading.lift, outputs(op.formula(module, *given, **params)))
        unchanged = {*op.wide_outputs, *op.whole_outputs}
        stored = (result if k in unchanged else module.stored(result) for k, result in enumerate(results))
        return [result.within(roundoff) for result in stored]


def _lifted(module: Any, arrays: Sequence[Array]) -> list[Any]:
    return [module.reading.lift(a) if holds_floats(a) else a for a in map(np.asarray, arrays)]


def _kept(op: Op, module: Any, given: Sequence[Any], params: Mapping[str, Any]) -> dict[int, tuple[Any, np.ndarray]]:
    """Of the inputs that a forward op made: what the others give for them, and which elements may be taken for that.

    The forward may have seen the others before they were rounded to what is at hand.
    """
    if op.kept is None:
        return {}

    def made_of(arrays: Sequence[Any]) -> dict[int, Any]:
        made = op.kept(module, *arrays, **params)  # type: ignore[misc]
        return {i: x if i in op.wide_inputs else module.stored(x) for i, x in made.items()}

    made = made_of(given)
    within = {i: given[i].lies_within(x) for i, x in made.items()}
    if not all(w.all() for w in within.values()):
        unrounded = [x.before_rounding() if isinstance(x, Bounded) else x for x in given]
        within = {i: given[i].lies_within(x) & np.isfinite(made[i].error) for i, x in made_of(unrounded).items()}
    return {i: (x, within[i]) for i, x in made.items()}


def jvp(op: Op, arrays: tuple[Array, ...], tangents: tuple[Array | None, ...], **params: Any) -> np.ndarray:
    """The derivative of the first output along `tangents` (None: held fixed), exactly, in float64."""
    duals = [
        Dual(np.asarray(a, np.float64), np.asarray(t, np.float64)) if t is not None else _fixed(a)
        for a, t in zip(arrays, tangents, strict=True)
    ]
    return Dual.lift(outputs(op.formula(dual_module, *duals, **params))[0]).tangent


def _fixed(array: Array) -> Any:
    return Dual.lift(array) if holds_floats(np.asarray(array)) else array
