"""A formula read for its error: every array carries a bound on what floating point may have done to it.

Running error analysis (Wilkinson; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 3): beside its
value in float64 an array carries `error`, a bound on |computed - value| over every evaluation in the given precision
in which each primitive commits at most its own rounding and sums run in any order. A fused kernel is judged by the
plain math, and cancellation is paid for where it happens. It also carries S, the sum of the absolute values of the
terms that were added on the way, handed on like an error: times the other factor, times a function's slope. It is the
unit in which an evaluation is judged that adds in another order (for a dot product: sum |x_i y_i|).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import numpy as np
from scipy import special

from minibert.kernels.readings.precisions import PRECISIONS, PRODUCTS, Precision
from minibert.kernels.readings.reading import Reading, ReadingModule

# What a library function may commit, in units of the unit roundoff (half an ulp), relative to its result.
ALLOWANCE = {"exp": 4, "log": 4, "sqrt": 1, "tanh": 8, "erf": 8}


LONGEST_CHAIN = 2**20  # additions one after the other, each with its rounding


class Bounded(Reading):
    """value, error, S; `precision`, `storage` and `operand_roundoff` are set by `bounded_module`."""

    width = 3
    precision: Precision
    storage: Precision | None  # in which results, and what the formula calls `stored`, are kept
    operand_roundoff: float  # of the operands of a product, on tensor cores

    def stored(self) -> Self:
        """What memory gives back: rounded, where it keeps fewer bits than the arithmetic has."""
        if self.storage is None:
            return self
        # conversions round below the smallest normal number too, and never flush
        own = self.storage.roundoff * (np.abs(self.value) + self.error + self.storage.tiny)
        return type(self)(self.value, self.error + own, self.terms)

    def before_rounding(self) -> Self:
        """An input as it may have been before it was rounded to what is at hand."""
        kept = self.storage or self.precision
        return type(self)(self.value, self.error + kept.roundoff * np.abs(self.value) + kept.tiny, self.terms)

    def lies_within(self, made: Self) -> np.ndarray:
        """Where these numbers may be those that an evaluation made."""
        return (np.abs(self.value - made.value) <= made.error) & np.isfinite(made.error)

    def unless_made_again(self, made: Self, where: np.ndarray) -> Self:
        """These numbers, or there what an evaluation makes of others, which should be the same."""
        apart = np.where(where, np.abs(self.value - made.value) + made.error, 0)
        return type(self)(
            self.value, self.error + apart, np.where(where, np.maximum(self.terms, made.terms), self.terms)
        )

    @classmethod
    def lift(cls, x: Any) -> Self:
        if isinstance(x, cls):
            return x
        value = np.asarray(x, np.float64)
        error = np.zeros_like(value)
        if isinstance(x, float):  # a constant of the formula is rounded to the precision when it meets an array
            mantissa = np.frexp(x)[0] / cls.precision.roundoff
            error = abs(value) * cls.precision.roundoff * (mantissa != np.rint(mantissa))
        return cls(value, error, np.abs(value))

    @property
    def error(self) -> np.ndarray:
        return self.parts[1]

    @property
    def terms(self) -> np.ndarray:
        return self.parts[2]

    @classmethod
    def rounded(cls, value: np.ndarray, error: Any, terms: Any = None, units: float = 1) -> Self:
        """`value` with what it inherited, plus `units` roundings of the computed result."""
        size = np.abs(value)
        error = np.asarray(error, np.float64)
        own = units * cls.precision.roundoff * (size + error) + cls.precision.tiny
        return cls(value, error + own, size if terms is None else terms)

    @classmethod
    def gamma(cls, count: Any) -> Any:
        """gamma_n = n u / (1 - n u): the bound of n roundings (Higham, lemma 3.1); unbounded from n u = 1 on.

        Of a sum of more than `LONGEST_CHAIN` terms it is asked that they are added in blocks or as a tree: else the
        bound of a float32 norm of a whole model would be infinite, and say nothing.
        """
        product = np.minimum(np.asarray(count, np.float64), LONGEST_CHAIN) * cls.precision.roundoff
        return np.where(product < 1, product / np.where(product < 1, 1 - product, 1), np.inf)

    def add(self, other: Self) -> Self:
        return self.rounded(self.value + other.value, self.error + other.error, self.terms + other.terms)

    def subtract(self, other: Self) -> Self:
        return self.rounded(self.value - other.value, self.error + other.error, self.terms + other.terms)

    def negative(self) -> Self:
        return type(self)(-self.value, self.error, self.terms)

    def multiply(self, other: Self) -> Self:
        a, b = abs(self.value), abs(other.value)
        inherited = a * other.error + self.error * b + self.error * other.error
        return self.rounded(self.value * other.value, inherited, np.maximum(self.terms * b, a * other.terms))

    def divide(self, other: Self) -> Self:
        value = self.value / other.value
        smallest = abs(other.value) - other.error  # the divisor may have been computed this small
        with np.errstate(divide="ignore", invalid="ignore"):
            inherited = np.where(
                smallest > 0, (self.error + abs(value) * other.error) / np.where(smallest > 0, smallest, 1), np.inf
            )
        return self.rounded(value, inherited, np.maximum(self.terms, abs(value) * other.terms) / abs(other.value))

    def matmul(self, other: Self) -> Self:
        a, b = abs(self.value), abs(other.value)
        k = self.shape[-1]
        terms = a @ b
        r = self.operand_roundoff
        inherited = (a @ other.error + self.error @ (b + other.error)) * (1 + r) ** 2 + r * (2 + r) * terms
        error = inherited + self.gamma(k) * (terms + inherited) + k * self.precision.tiny
        return type(self)(self.value @ other.value, error, np.maximum(self.terms @ b, a @ other.terms))

    def sum(self, axis: Any = None, keepdims: Any = False) -> Self:
        value = self.value.sum(axis=axis, keepdims=keepdims)
        size, inherited, terms = (
            x.sum(axis=axis, keepdims=keepdims) for x in (abs(self.value), self.error, self.terms)
        )
        count = self.size // max(1, value.size)
        error = inherited + self.gamma(max(0, count - 1)) * (size + inherited) + self.precision.tiny
        return type(self)(np.asarray(value), np.asarray(error), np.asarray(terms))

    def segment_sum(self, ids: np.ndarray, count: int) -> Self:
        def total(part: np.ndarray) -> np.ndarray:
            out = np.zeros((count, *part.shape[1:]))
            np.add.at(out, ids, part)
            return out

        size, inherited = total(abs(self.value)), total(self.error)
        repeats = np.bincount(ids, minlength=count).reshape(-1, *(1,) * (self.ndim - 1))
        error = inherited + self.gamma(np.maximum(repeats - 1, 0)) * (size + inherited)
        return type(self)(total(self.value), error + self.precision.tiny * (repeats > 0), total(self.terms))

    def max(self, axis: Any = None, keepdims: Any = False) -> Self:
        return self.each(lambda part: part.max(axis=axis, keepdims=keepdims))

    def maximum(self, other: Self) -> Self:
        return type(self)(*(np.maximum(a, b) for a, b in zip(self.parts, other.parts, strict=True)))

    def _function(self, value: np.ndarray, slope: np.ndarray, inherited: Any, units: int) -> Self:
        """A library function of this array, with its `slope` here and its rounding in `units` of u."""
        return self.rounded(value, inherited, np.maximum(np.abs(value), slope * self.terms), units)

    def exp(self) -> Self:
        value = np.exp(self.value)
        return self._function(value, value, value * np.expm1(self.error), ALLOWANCE["exp"])

    def log(self) -> Self:
        share = self.error / self.value
        inherited = np.where(share < 1, -np.log1p(-np.minimum(share, 1 - 1e-16)), np.inf)
        return self._function(np.log(self.value), 1 / self.value, inherited, ALLOWANCE["log"])

    def sqrt(self) -> Self:
        value = np.sqrt(self.value)
        root = np.where(value > 0, value, 1)  # sqrt(x) - sqrt(x - e) <= e / sqrt(x), and <= sqrt(e)
        inherited = np.where(value > 0, np.minimum(self.error / root, np.sqrt(self.error)), np.sqrt(self.error))
        return self._function(value, np.where(value > 0, 0.5 / root, 0), inherited, ALLOWANCE["sqrt"])

    def tanh(self) -> Self:
        return self._function(
            np.tanh(self.value), *self._slopes(lambda x: np.cosh(np.minimum(x, 300)) ** -2.0), ALLOWANCE["tanh"]
        )

    def erf(self) -> Self:
        def slope(x: np.ndarray) -> np.ndarray:
            return 2 / np.sqrt(np.pi) * np.exp(-(np.minimum(x, 30) ** 2))

        return self._function(special.erf(self.value), *self._slopes(slope), ALLOWANCE["erf"])

    def _slopes(self, slope: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of a function steepest at 0: its slope here, and the error times the steepest slope within the error."""
        size = np.abs(self.value)
        return slope(size), self.error * slope(np.maximum(size - self.error, 0))


class BoundedModule(ReadingModule):
    """With the rounding of what is `stored`."""

    def stored(self, x: Any) -> Any:
        return self.reading.lift(x).stored()


@cache
def bounded_module(precision: str, storage: str | None = None, products: str = "float32") -> ReadingModule:
    """The array module that bounds an evaluation in `precision`: float64, float32, float16 or bfloat16.

    `storage` (float16, bfloat16): in fewer bits is kept what the formula calls `stored`. `products` "tf32": operands of
    products are rounded to 10 bits of mantissa.
    """
    kept = None if storage is None else PRECISIONS[storage]
    parts = {"precision": PRECISIONS[precision], "storage": kept, "operand_roundoff": PRODUCTS[products]}
    return BoundedModule(type(f"Bounded_{precision}_{storage or ''}_{products}", (Bounded,), parts))
