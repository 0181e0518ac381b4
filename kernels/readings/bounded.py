"""A formula read for its error: every array carries a bound on what floating point may have done to it.

Running error analysis (Wilkinson; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 3): beside its
value in float64 an array carries `error`, a bound on |computed - value| over every evaluation in the given precision
in which each primitive commits at most its own rounding. A fused kernel is judged by the plain math, and cancellation
is paid for where it happens.

It also carries S, the sum of the absolute values of the terms that were added on the way, handed on like an error:
times the other factor, times a function's slope. It is the unit in which an evaluation is judged that adds in another
order (for a dot product: sum |x_i y_i|).

An evaluation may add terms in any order, and may multiply each by a factor that the formula applies to their sum: as y
= x a + (b - mean a), a = rstd w, for y = (x - mean) rstd w + b. So where an operand is itself the result of k additions
(`adds`; functions and long sums begin anew), a product or a quotient rounds at S instead of at its value, and an
addition at its value and k times S. The additions inside a long sum or a product of matrices (`late`) have rounded at S
already; but an accumulator may begin with what is added to it, as a bias, and then they round at that besides. Of that
y the formula's own roundings are, in u, |d a| for d = x - mean, then twice (|x| + S_mean) |a|, then |y| + (|x| +
S_mean) |a| + |b|; the other road commits |d a| in making a, |x a| + |mean a| in the products, |b - mean a| <= |b| +
|mean a| and |y| in the additions: never more, for all rows and offsets.

In the same way a factor may be taken into an exponent, exp(x - log s) for exp(x) / s, where x is rounded once more.

And `likely`, what a sensible evaluation stays under (Higham and Mary, "A new approach to probabilistic rounding error
analysis", 2019, theorem 2.4): as `error`, but n roundings of a sum count as `LAMBDA` sqrt(n), being as often up as
down. They are not where terms are all equal, or sorted so that the small ones come last: there it says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, Self

import numpy as np

from minibert.kernels.array_module import numpy_module
from minibert.kernels.readings.precisions import PRECISIONS, PRODUCTS, Precision
from minibert.kernels.readings.reading import Reading, ReadingModule

# What a library function may commit, in units of the unit roundoff (half an ulp), relative to its result.
ALLOWANCE = {"exp": 4, "log": 4, "sqrt": 1, "tanh": 8, "erf": 8}

ROUNDINGS_OF_COUNT = 32  # log s of up to 10^6 numbers is less than 14, and log may commit 4 u of that
LONGEST_CHAIN = 2**20  # additions one after the other, each with its rounding
LAMBDA = 4.0  # float32 sums one after the other of up to 2^17 random numbers, of one sign or both, reach 1.3

Rule = Callable[..., np.ndarray]  # what a result inherits of its operands' errors


class Both(NamedTuple):
    """Of the hard bound and of the likely one: an error, or how much n roundings are, relative to what is rounded."""

    hard: Any
    likely: Any


class Bounded(Reading):
    """value, error, likely, S, adds, late; `bounded_module` sets `precision`, `storage` and `operand_roundoff`."""

    width = 6
    counts = False  # whether each element is exp(0), which is 1 to the last bit
    precision: Precision
    storage: Precision | None  # in which results, and what the formula calls `stored`, are kept
    operand_roundoff: float  # of the operands of a product, on tensor cores

    @classmethod
    def lift(cls, x: Any) -> Self:
        if isinstance(x, cls):
            return x
        value = np.asarray(x, np.float64)
        error = np.zeros_like(value)
        if isinstance(x, float):  # a constant of the formula is rounded to the precision when it meets an array
            mantissa = np.frexp(x)[0] / cls.precision.roundoff
            error = abs(value) * cls.precision.roundoff * (mantissa != np.rint(mantissa))
        none = np.zeros(value.shape, np.int32)
        return cls(value, error, error, np.abs(value), none, none)

    error = property(lambda self: self.parts[1])
    likely = property(lambda self: self.parts[2])
    terms = property(lambda self: self.parts[3])
    adds = property(lambda self: self.parts[4])
    late = property(lambda self: self.parts[5])

    def each(self, move: Callable[[np.ndarray], np.ndarray]) -> Self:
        value, error, likely, terms, adds, late = self.parts
        moved = move(error)  # `likely` is `error` itself until something is summed
        return type(self)(
            move(value), moved, moved if likely is error else move(likely), move(terms), move(adds), move(late)
        )

    def erring(self, more: Both, terms: np.ndarray | None = None, adds: np.ndarray | None = None) -> Self:
        """These numbers with so much more error."""
        return type(self)(
            self.value, self.error + more.hard, self.likely + more.likely,
            self.terms if terms is None else terms, self.adds if adds is None else adds, self.late,
        )  # fmt: skip

    def stored(self) -> Self:
        """What memory gives back: rounded, where it keeps fewer bits than the arithmetic has."""
        kept = self.storage
        if kept is None:
            return self
        # conversions round below the smallest normal number too, and never flush
        size = np.abs(self.value) + kept.tiny
        return self.erring(Both(*(kept.roundoff * (size + error) for error in (self.error, self.likely))))

    def if_finite(self) -> Self:
        """What integers hold of these numbers: anything where they are not finite, for there is no such integer."""
        finite = np.isfinite(self.value)
        value, error, likely, *more = self.parts
        value, error, likely = (
            np.where(finite, part, there)
            for part, there in zip((value, error, likely), (0.0, np.inf, np.inf), strict=True)
        )
        return type(self)(value, error, likely, *more)

    def before_rounding(self) -> Self:
        """An input as it may have been before it was rounded to what is at hand."""
        kept = self.storage or self.precision
        more = kept.roundoff * np.abs(self.value) + kept.tiny
        return self.erring(Both(more, more))

    def lies_within(self, made: Self) -> np.ndarray:
        """Where these numbers may be those that an evaluation made."""
        return (np.abs(self.value - made.value) <= made.error) & np.isfinite(made.error)

    def unless_made_again(self, made: Self, where: np.ndarray) -> Self:
        """These numbers, or there what an evaluation makes of others, which should be the same."""
        apart = np.abs(self.value - made.value)
        more = Both(*(np.where(where, apart + error, 0) for error in (made.error, made.likely)))
        terms, adds = (
            np.where(where, np.maximum(a, b), a) for a, b in zip(self.parts[3:5], made.parts[3:5], strict=True)
        )
        return self.erring(more, terms, adds)

    @classmethod
    def gamma(cls, count: Any) -> Any:
        """gamma_n = n u / (1 - n u): the bound of n roundings (Higham, lemma 3.1); unbounded from n u = 1 on.

        Of a sum of more than `LONGEST_CHAIN` terms it is asked that they are added in blocks or as a tree: else the
        bound of a float32 norm of a whole model would be infinite, and say nothing.
        """
        product = np.minimum(np.asarray(count, np.float64), LONGEST_CHAIN) * cls.precision.roundoff
        return np.where(product < 1, product / np.where(product < 1, 1 - product, 1), np.inf)

    @classmethod
    @lru_cache(maxsize=256)
    def roundings_of_all(cls, count: int) -> Both:
        """`roundings` where all sums have as many terms."""
        return cls.roundings(np.asarray(count))

    @classmethod
    def roundings(cls, count: Any) -> Both:
        """What that many roundings of partial sums may be, and probably are."""
        hard = cls.gamma(count)
        return Both(hard, np.minimum(hard, cls.gamma(LAMBDA * np.sqrt(np.minimum(count, LONGEST_CHAIN)))))

    @classmethod
    def made(
        cls, value: np.ndarray, rule: Rule, operands: tuple[Self, ...], at: np.ndarray, terms: np.ndarray,
        rounded: Both | None = None, adds: Any = 0, tiny: Any = 1.0, late: Any = 0,
    ) -> Self:  # fmt: skip
        """A result with what it inherits by `rule`, and its own roundings (by default one) of what is as large as `at`.

        `tiny`: how many of the smallest normal numbers may have been flushed.
        """
        rounded = rounded or Both(cls.precision.roundoff, cls.precision.roundoff)

        def total(errors: tuple[np.ndarray, ...], share: Any) -> np.ndarray:
            inherited = rule(*errors)
            own = np.add(at, inherited, dtype=np.float64)
            own *= share  # in place: of arrays of a million elements, memory takes the time
            own += inherited
            own += tiny * cls.precision.tiny
            return np.asarray(own)

        error = likely = total(tuple(x.error for x in operands), rounded.hard)
        if rounded.likely is not rounded.hard or any(x.likely is not x.error for x in operands):
            likely = total(tuple(x.likely for x in operands), rounded.likely)
        value = np.asarray(value)
        counts = (
            count if np.shape(count) == value.shape and np.ndim(count) else np.full(value.shape, count, np.int32)
            for count in (adds, late)
        )
        return cls(value, error, likely, np.asarray(terms), *counts)

    def summed(self) -> np.ndarray:
        """What an evaluation may add up instead of this number: S, where it is a sum of others."""
        size = np.abs(self.value)
        return np.where(self.adds > 0, self.terms, size) if self.adds.any() else size

    def add(self, other: Self) -> Self:
        value, terms, before = self.value + other.value, self.terms + other.terms, self.adds + other.adds
        at = np.abs(value) + before * (self.summed() + other.summed())
        late = self.late + other.late
        total = self.made(value, np.add, (self, other), at, terms, adds=before + 1, late=late)
        if not late.any():
            return total
        after = (self.roundings(a.late) for a in (self, other))  # an accumulator may begin with what is added to it
        return total.erring(Both(*(m * other.summed() + n * self.summed() for m, n in zip(*after, strict=True))))

    def subtract(self, other: Self) -> Self:
        return self.add(other.negative())

    def negative(self) -> Self:
        return type(self)(-self.value, *self.parts[1:])

    def multiply(self, other: Self) -> Self:
        a, b, value = abs(self.value), abs(other.value), self.value * other.value
        terms = np.maximum(self.terms * b, a * other.terms)
        adds = np.maximum(self.adds, other.adds)
        at = np.maximum(self.summed() * b, a * other.summed()) if adds.any() else abs(value)
        return self.made(value, lambda e, f: a * f + e * (b + f), (self, other), at, terms, adds=adds)

    def divide(self, other: Self) -> Self:
        value, size = self.value / other.value, abs(other.value)

        def inherited(e: np.ndarray, f: np.ndarray) -> np.ndarray:
            smallest = size - f  # the divisor may have been computed this small
            return np.where(smallest > 0, (e + abs(value) * f) / np.where(smallest > 0, smallest, 1), np.inf)

        at, terms = self.summed() / size, np.maximum(self.terms, abs(value) * other.terms) / size
        return self.made(value, inherited, (self, other), at, terms, adds=np.broadcast_to(self.adds, value.shape))

    def matmul(self, other: Self) -> Self:
        a, b, r = abs(self.value), abs(other.value), self.operand_roundoff
        size = a @ b
        terms = size if self._is_plain() and other._is_plain() else np.maximum(self.terms @ b, a @ other.terms)

        kept = self.storage
        lost = kept.tiny if kept is not None and kept.tiny == self.precision.tiny else 0.0  # bfloat16 below it may be 0
        flushed = lost * (a.sum(axis=-1)[..., None] + b.sum(axis=-2)[..., None, :])

        def inherited(e: np.ndarray, f: np.ndarray) -> np.ndarray:
            return (_product(a, f) + _product(e, b + f)) * (1 + r) ** 2 + r * (2 + r) * size + flushed

        k = self.shape[-1]
        return self.made(
            self.value @ other.value,
            inherited,
            (self, other),
            size,
            terms,
            self.roundings_of_all(k),
            tiny=float(k),
            late=k,
        )

    def sum(self, axis: Any = None, keepdims: Any = False) -> Self:
        """Of exp(0) it is a count, in which nothing is rounded; its logarithm, in an exponent, is: exp(x - log s)."""

        def total(part: np.ndarray) -> np.ndarray:
            return np.asarray(part.sum(axis=axis, keepdims=keepdims))

        value, size, terms = total(self.value), total(abs(self.value)), total(self.terms)
        count = self.size // max(1, value.size)
        after = max(0, count - 1)
        after = min(after, ROUNDINGS_OF_COUNT) if self.counts else after
        return self.made(value, total, (self,), size, terms, self.roundings_of_all(after), late=after)

    def segment_sum(self, ids: np.ndarray, count: int) -> Self:
        def total(part: np.ndarray) -> np.ndarray:
            out = np.zeros((count, *part.shape[1:]))
            np.add.at(out, ids, part)
            return out

        size, terms = total(abs(self.value)), total(self.terms)
        repeats = np.bincount(ids, minlength=count).reshape(-1, *(1,) * (self.ndim - 1))
        after = np.maximum(repeats - 1, 0)
        rounded = self.roundings(after)
        return self.made(total(self.value), total, (self,), size, terms, rounded, tiny=repeats > 0, late=after)

    def _is_plain(self) -> bool:
        """Whether no element is the sum of others."""
        return bool((self.terms == abs(self.value)).all())

    def max(self, axis: Any = None, keepdims: Any = False) -> Self:
        """The error and the terms are those of elements that may be the largest: a mask's -1e30 is none of them."""
        may_be = self.value + self.error >= (self.value - self.error).max(axis=axis, keepdims=True)
        may_be |= ~may_be.any(axis=axis, keepdims=True)  # beside NaN nothing is known
        value = self.value.max(axis=axis, keepdims=keepdims)
        found = self.each(lambda part: np.where(may_be, part, 0).max(axis=axis, keepdims=keepdims))
        return type(self)(value, *found.parts[1:]).alone()

    def maximum(self, other: Self) -> Self:
        return type(self)(*(np.maximum(a, b) for a, b in zip(self.parts, other.parts, strict=True))).alone()

    def alone(self) -> Self:
        """What is chosen among sums is a number: nothing can be added to it before."""
        return type(self)(*self.parts[:5], np.zeros_like(self.late))

    def _function(
        self, value: np.ndarray, slope: np.ndarray, rule: Rule, units: int, more: np.ndarray | None = None
    ) -> Self:  # fmt: skip
        """A library function of this array, with its `slope` here, its rounding in `units` of u, and `more` of it."""
        own, size = units * self.precision.roundoff, np.abs(value)
        rounded = Both(own, own) if more is None else Both(own + more, own)
        return self.made(value, rule, (self,), size, np.maximum(size, slope * self.terms), rounded)

    def exp(self) -> Self:
        value = np.exp(self.value)

        def inherited(e: np.ndarray) -> np.ndarray:  # exp(x + e) - exp(x); of a mask's -1e30 the product is 0 inf
            return np.where(e < 1, value * np.expm1(e), np.exp(self.value + e) - value)

        again = np.where(value > 0, self.precision.roundoff * np.abs(self.value), 0.0)
        # nothing but 0 came together in what this is of
        counts = not self.terms.any() and bool((self.error < self.precision.roundoff / 2).all())
        result = self._function(value, value, inherited, 0 if counts else ALLOWANCE["exp"], again)
        result.counts = counts
        return result

    def log(self) -> Self:
        def inherited(e: np.ndarray) -> np.ndarray:
            share = e / self.value
            return np.where(share < 1, -np.log1p(-np.minimum(share, 1 - 1e-16)), np.inf)

        return self._function(np.log(self.value), 1 / self.value, inherited, ALLOWANCE["log"])

    def sqrt(self) -> Self:
        value = np.sqrt(self.value)
        root = np.where(value > 0, value, 1)  # sqrt(x) - sqrt(x - e) <= e / sqrt(x), and <= sqrt(e)

        def inherited(e: np.ndarray) -> np.ndarray:
            return np.where(value > 0, np.minimum(e / root, np.sqrt(e)), np.sqrt(e))

        return self._function(value, np.where(value > 0, 0.5 / root, 0), inherited, ALLOWANCE["sqrt"])

    def rint(self) -> Self:
        """Nothing is rounded but what lies near a tie, which may go to its other side."""
        value = np.rint(self.value)

        def moved(e: np.ndarray) -> np.ndarray:
            return np.maximum(np.rint(self.value + e) - value, value - np.rint(self.value - e))

        none = np.zeros(value.shape, np.int32)
        return type(self)(value, moved(self.error), moved(self.likely), np.abs(value), none, none)

    def tanh(self) -> Self:
        return self._steepest_at_0(np.tanh(self.value), lambda x: np.cosh(np.minimum(x, 300)) ** -2.0, "tanh")

    def erf(self) -> Self:
        def slope(x: np.ndarray) -> np.ndarray:
            return 2 / np.sqrt(np.pi) * np.exp(-(np.minimum(x, 30) ** 2))

        return self._steepest_at_0(numpy_module.erf(self.value), slope, "erf")

    def _steepest_at_0(self, value: np.ndarray, slope: Callable[[np.ndarray], np.ndarray], name: str) -> Self:
        """The error times the steepest slope within the error."""
        size = np.abs(self.value)
        return self._function(value, slope(size), lambda e: e * slope(np.maximum(size - e, 0)), ALLOWANCE[name])


def _product(a: np.ndarray, b: np.ndarray) -> Any:
    """a @ b; of no error there is none to multiply."""
    return a @ b if a.any() and b.any() else 0.0


class BoundedModule(ReadingModule):
    """With the rounding of what is `stored`, and of integers that a float cannot hold."""

    def stored(self, x: Any) -> Any:
        return self.reading.lift(x).stored()

    def as_floats(self, whole: np.ndarray, like: Any) -> Any:
        exact = super().as_floats(whole, like)
        roundoff = self.reading.precision.roundoff
        more = np.where(np.abs(exact.value) * roundoff > 0.5, roundoff * np.abs(exact.value), 0.0)
        return exact.erring(Both(more, more))


@cache
def bounded_module(precision: str, storage: str | None = None, products: str = "float32") -> ReadingModule:
    """The array module that bounds an evaluation in `precision`: float64, float32, float16 or bfloat16.

    `storage` (float16, bfloat16): in fewer bits is kept what the formula calls `stored`. `products` "tf32": operands of
    products are rounded to 10 bits of mantissa.
    """
    kept = None if storage is None else PRECISIONS[storage]
    parts = {"precision": PRECISIONS[precision], "storage": kept, "operand_roundoff": PRODUCTS[products]}
    return BoundedModule(type(f"Bounded_{precision}_{storage or ''}_{products}", (Bounded,), parts))
