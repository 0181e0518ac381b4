"""How far an output stands from its formula: four numbers, and a verdict element by element.

The formula is evaluated in float64 on the inputs that the backend saw (already rounded to its precision), and beside it
runs a bound on what any evaluation in that precision may commit (`minibert.kernels.readings`: Wilkinson's running error
analysis). With u the unit roundoff of the precision:

- `ulp_max`: the largest |got - expected|, in units in the last place of `expected`: 2u 2^e where 2^e <= |expected| <
  2^(e+1). Below the smallest normal number it is the unit of that number. It misleads where terms cancel.
- `err_over_us`: the largest |got - expected| / (u S), S the sum of the absolute values of the terms added on the way.
- `bound_share`: the largest |got - expected| / bound. Passing means at most 1 on every element; a bound of 0 (copies)
  means the very same number.
- `likely_share`: the largest |got - expected| / likely, likely the error that a sensible evaluation stays under on
  numbers as random as data are. Above 1, under the bound, a result is not wrong but poor: a sum in too few bits, an exp
  good to four digits. Of equal numbers, of rows sorted or far from 0, it says nothing: their roundings do not average.

The float64 evaluation has rounding errors as well. They are at most u(float64) / u of those bounded, so the bound is
widened by that share: by 2^-29 for float32, and doubled for float64, where both sides commit it.

An expression that equals the formula may round its result a few times more, as g (1 - y)(1 + y) for g (1 - y y), which
is the better of the two: so a result that is rounded at all may be off by `EQUALS` u |expected| besides.

Where no order of evaluation could round (`minibert.kernels.readings.exact`) the bound may be asked to be 0: then one
element that was dropped, counted twice or taken from next door is a difference, however many were added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.backends.base import NARROW, dtype_of
from minibert.kernels.op import Array, Op, holds_floats, outputs
from minibert.kernels.readings import PRECISIONS, Bound, bound, exact

EQUALS = 2  # roundings of a result


def _place(name: str, place: tuple[int, ...]) -> str:
    return name + (f"[{', '.join(map(str, place))}]" if place else "")


RARE = 50  # a value that more than one in so many elements have says nothing of where it came from


class Worst(NamedTuple):
    """The element that used up the largest share of its bound."""

    output: int  # 0: the output; 1 and on: what is kept for the gradient
    place: tuple[int, ...]
    expected: float
    got: float
    bound: float
    name: str  # what the formula calls that output
    instead: tuple[int, ...] | None = None  # the place, in its row or column, whose value it got

    @property
    def where(self) -> str:
        """As `rstd[3]`."""
        return _place(self.name, self.place)

    def __str__(self) -> str:
        off = abs(self.got - self.expected)
        got = f"expected {self.expected:.9g}, got {self.got:.9g}"
        instead = "" if self.instead is None else f"; that is the value of {_place(self.name, self.instead)}"
        return f"{self.where}: {got}, off by {off:.3g}, allowed {self.bound:.3g}{instead}"


class Poor(NamedTuple):
    """The element that stands farthest beyond what is likely, both in units of u S."""

    place: tuple[int, ...]
    off: float
    likely: float
    name: str  # what the formula calls its output

    def __str__(self) -> str:
        where = _place(self.name, self.place)
        return f"{where}: off by {self.off:.3g} u S, where sensible orders of evaluation stay under {self.likely:.3g}"


class Judgement(NamedTuple):
    """What the module's docstring says, over all outputs of one call."""

    ulp_max: float
    err_over_us: float
    bound_share: float
    ok: bool
    worst: Worst | None  # None where there is no element, or `problem` says why none was looked at
    problem: str  # wrong number of outputs, shape or dtype; else empty
    unbounded: int  # elements of which the bound says nothing, being infinite: they count as right if finite
    likely_share: float = 0.0
    poorest: Poor | None = None  # where `likely_share` was reached; None where nothing was off

    @property
    def poor(self) -> bool:
        """Right, and with more error than an evaluation of the formula has to have."""
        return self.ok and self.likely_share > 1


def stored_as(op: Op, arrays: Sequence[Array], dtype: str) -> list[np.dtype[Any] | None]:
    """In which dtype each input is given where arrays hold `dtype`; None for one that holds no floats."""
    kept = [dtype_of("float32" if dtype in NARROW and i in op.wide_inputs else dtype) for i in range(len(arrays))]
    return [k if holds_floats(a) else None for k, a in zip(kept, arrays, strict=True)]


def expect(
    op: Op, arrays: Sequence[Array], params: Mapping[str, Any], dtype: str, products: str = "float32",
    exactly: bool = False,
) -> list[Bound]:  # fmt: skip
    """What `op` should give on these NumPy arrays, with the bound for an evaluation in `dtype`.

    In 16 bits arrays are stored, and results rounded once; arithmetic is in float32. `products` is the backend's
    `product_mode`. `exactly`: where no order of evaluation could round, the bound is 0 (for samples that are drawn to
    be of that kind: finding the places costs a second reading of the formula).

    For an op that writes in place: the arrays as they were before.
    """
    precision, storage = ("float32", dtype) if dtype in NARROW else (dtype, None)
    widened = 1 + PRECISIONS["float64"].roundoff / PRECISIONS[precision].roundoff
    products = products if dtype == "float32" else "float32"
    arithmetic: dict[str, Any] = {"precision": precision, "storage": storage, "products": products}
    found = bound(op, *arrays, **arithmetic, **params)
    found = [_with_room(b, widened, PRECISIONS[precision].roundoff) for b in found]
    if not exactly:
        return found
    masks = exact(op, *arrays, **arithmetic, **params)
    return [
        b._replace(error=np.where(mask, 0.0, b.error), likely=np.where(mask, 0.0, b.likely))
        for b, mask in zip(found, masks, strict=True)
    ]


def _with_room(b: Bound, widened: float, roundoff: float) -> Bound:
    """For the rounding errors of the float64 evaluation, and for expressions that equal the formula."""
    more = np.where(b.error > 0, EQUALS * roundoff * np.abs(b.value), 0.0)
    return b._replace(error=b.error * widened + more, likely=b.likely * widened + more)


def judge(
    op: Op, arrays: Sequence[Array], params: Mapping[str, Any], got: Any, dtype: str, products: str = "float32"
) -> Judgement:
    """Judge what a backend returned (as NumPy: one array, or a tuple with the residuals) for one call of `op`.

    For an op that writes in place `arrays` are those from before the call, and `got` those that it wrote.
    """
    return judge_against(expect(op, arrays, params, dtype, products), got)


def judge_against(expected: Sequence[Bound], got: Any) -> Judgement:
    """The same, where what is expected is known already."""
    results = outputs(got)
    problem = _problem(expected, results)
    if problem:
        return Judgement(np.inf, np.inf, np.inf, False, None, problem, 0)
    ulp, over_us, share, unbounded, worst = 0.0, 0.0, 0.0, 0, None
    likely_share, poorest = 0.0, None
    for k, (b, result) in enumerate(zip(expected, results, strict=True)):
        if not result.size:
            continue
        off, allowed = _distance(b, result)
        shares = _share(off, allowed)
        at = np.unravel_index(int(shares.argmax()), shares.shape)
        if worst is None or shares[at] > share:
            worst = Worst(k, tuple(map(int, at)), float(b.value[at]), float(result[at]), float(allowed[at]), b.name)
        share = max(share, float(shares[at]))
        ulp = max(ulp, float((off / unit_in_last_place(b.value, b.dtype)).max()))
        unit = np.maximum(PRECISIONS[b.dtype].roundoff * b.terms, PRECISIONS[b.dtype].tiny)
        over_us = max(over_us, float(_share(off, unit).max()))
        shares = _share(off, np.minimum(allowed, np.where(np.isnan(b.likely), np.inf, b.likely)))
        at = np.unravel_index(int(shares.argmax()), shares.shape)
        if shares[at] > likely_share:
            likely_share = float(shares[at])
            with np.errstate(invalid="ignore", over="ignore"):
                off_in_units, likely = (float(x[at] / unit[at]) for x in (off, b.likely))
            poorest = Poor(tuple(map(int, at)), off_in_units, likely, b.name)
        unbounded += int(np.isinf(allowed).sum())
    if worst is not None and share > 1:
        worst = worst._replace(instead=_value_of_another(expected[worst.output], worst))
    return Judgement(ulp, over_us, share, share <= 1, worst, "", unbounded, likely_share, poorest)


def _value_of_another(b: Bound, worst: Worst) -> tuple[int, ...] | None:
    """The nearest place in the same row or column whose value that is; None where it is nobody's, or many have it."""
    with np.errstate(invalid="ignore"):
        alike = np.argwhere(np.abs(b.value - worst.got) <= b.error)
    if worst.got == 0 or not 0 < len(alike) <= max(1, b.value.size // RARE):
        return None
    steps = np.abs(alike - np.asarray(worst.place))
    one_axis = alike[(steps > 0).sum(axis=1) == 1]
    if not len(one_axis):
        return None
    nearest = one_axis[np.abs(one_axis - np.asarray(worst.place)).sum(axis=1).argmin()]
    return tuple(map(int, nearest))


def _problem(expected: Sequence[Bound], results: tuple[Array, ...]) -> str:
    problem = misshapen(expected, results)
    wrong = (k for k, (b, r) in enumerate(zip(expected, results, strict=False)) if r.dtype.name != b.dtype)
    for k in () if problem else wrong:
        return f"output {expected[k].name}: expected dtype {expected[k].dtype}, got {results[k].dtype}"
    return problem


def misshapen(expected: Sequence[Bound], results: Sequence[Array]) -> str:
    """What is wrong with the number or the shapes of results, on whatever device they lie; empty if nothing is."""
    if len(results) != len(expected):
        return f"expected {len(expected)} outputs, got {len(results)}"
    for b, result in zip(expected, results, strict=True):
        if isinstance(result, np.ndarray) and result.dtype.kind in "OSU" and not result.shape:  # no array was returned
            kind = type(result.item()).__name__
            return f"output {b.name}: expected an array of shape {b.value.shape}, got {kind}"
        if tuple(result.shape) != b.value.shape:
            return f"output {b.name}: expected shape {b.value.shape}, got {tuple(result.shape)}"
    return ""


def _distance(b: Bound, result: Array) -> tuple[np.ndarray, np.ndarray]:
    """|got - expected| and what is allowed; infinity and NaN must be where the formula has them, and nowhere else."""
    got = np.asarray(result, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        same = (got == b.value) | (np.isnan(got) & np.isnan(b.value))
        beyond = np.abs(b.value) + b.error > PRECISIONS[b.dtype].largest  # may overflow, to its own side
        same |= beyond & (got == np.copysign(np.inf, b.value))
        off = np.where(same, 0.0, np.abs(got - b.value))
    off = np.where(np.isnan(off), np.inf, off)
    error = np.where(np.isnan(b.error), np.inf, b.error)  # an infinite error times 0: nothing is known
    return off, np.where(np.isfinite(b.value), error, 0.0)


def _share(off: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = off / allowed
    return np.where(off == 0, 0.0, np.where(np.isinf(off) | np.isnan(share), np.inf, share))


def unit_in_last_place(value: np.ndarray, dtype: str) -> np.ndarray:
    """Of each value; below the smallest normal number that of it."""
    precision = PRECISIONS[dtype]
    size = np.where(np.isfinite(value), np.maximum(np.abs(value), precision.tiny), 1.0)
    return np.ldexp(2 * precision.roundoff, np.frexp(size)[1] - 1)
