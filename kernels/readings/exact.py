"""A formula read for where floating point cannot round: there every order of evaluation gives the same bits.

Beside its value an element carries `unit`, the exponent of a power of two of which every number that was added on the
way is a whole multiple, and `reach`, the sum of the absolute values of those numbers. Whatever the order in which an
evaluation adds, and whether it distributes factors over sums, fuses products with additions or works in more bits,
each of its intermediate results is a whole multiple of 2^unit and at most `reach` in size. So if reach < 2^p 2^unit, p
the bits of the mantissa, all of them are numbers of that precision, and none is rounded.

What is computed of such an element alone (sums, products) is followed; a quotient counts as exact where the divisor is
a power of two, a mean where moreover all elements are the same number (a running mean rounds what differs), a function
such as exp never. Nothing is claimed of numbers that are multiples of less than the smallest normal number.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import numpy as np

from minibert.kernels.array_module import numpy_module
from minibert.kernels.readings.precisions import PRECISIONS, PRODUCTS, Precision
from minibert.kernels.readings.reading import UNARY, Reading, ReadingModule

UNKNOWN = -np.inf  # the unit of what may have been rounded; that of 0, a multiple of everything, is infinity
CONSTANT_BITS = 24  # a constant of the formula that needs more (0.1, sqrt(2)) is one that kernels round in their way


def lowest_bit(value: np.ndarray) -> np.ndarray:
    """The exponent of the largest power of two of which each number is a whole multiple."""
    mantissa, exponent = np.frexp(value)
    with np.errstate(invalid="ignore"):
        whole = np.where(np.isfinite(value), np.ldexp(mantissa, 53), 1).astype(np.int64)
    lowest = np.frexp((whole & -whole).astype(np.float64))[1] - 1
    return np.where(np.isfinite(value), np.where(value == 0, np.inf, exponent - 53.0 + lowest), UNKNOWN)


def power_of_two(exponent: np.ndarray) -> np.ndarray:
    """2^exponent, without rounding; of an infinite one 0 or infinity."""
    finite = np.isfinite(exponent)
    power = np.ldexp(1.0, np.where(finite, exponent, 0).astype(np.int64))
    return np.where(finite, power, np.where(exponent > 0, np.inf, 0.0))


def fits(value: np.ndarray, kept: Precision) -> np.ndarray:
    """Whether each number is one of that precision, and none that may be flushed."""
    lowest = lowest_bit(value)
    size = np.abs(value)
    return (size * kept.roundoff < power_of_two(lowest)) & (power_of_two(lowest) >= kept.tiny) & (size <= kept.largest)


class Exact(Reading):
    """value, unit, reach; `precision`, `storage` and `operand_roundoff` are set by `exact_module`."""

    width = 3
    precision: Precision
    storage: Precision | None
    operand_roundoff: float

    @classmethod
    def lift(cls, x: Any) -> Self:
        if isinstance(x, cls):
            return x
        value = np.asarray(x, np.float64)
        unit = lowest_bit(value)
        if isinstance(x, float) and not abs(x) < 2.0**CONSTANT_BITS * power_of_two(unit):
            unit = np.asarray(UNKNOWN)
        return cls.of(value, unit, np.abs(value))

    @classmethod
    def of(cls, value: Any, unit: Any, reach: Any) -> Self:
        """A 0 that no terms made has any unit; what is too large or too fine has none: it may overflow or vanish."""
        value, unit, reach = (np.asarray(part, np.float64) for part in (value, unit, reach))
        bounded = reach <= cls.precision.largest
        fine = unit < np.log2(cls.precision.tiny)
        unit = np.where(reach == 0, np.inf, np.where(~bounded | fine, UNKNOWN, unit))
        return cls(value, unit, np.where(bounded, reach, np.inf))

    @property
    def unit(self) -> np.ndarray:
        return self.parts[1]

    @property
    def reach(self) -> np.ndarray:
        return self.parts[2]

    def within(self, roundoff: float) -> np.ndarray:
        """Where no order of evaluation rounds with that unit roundoff."""
        return self.reach * roundoff < power_of_two(self.unit)

    def unless(self, rounded: np.ndarray) -> Self:
        return self.of(self.value, np.where(rounded, UNKNOWN, self.unit), self.reach)

    def stored(self) -> Self:
        """What memory gives back: the same, where it keeps enough bits."""
        return self if self.storage is None else self.unless(~fits(self.value, self.storage))

    def add(self, other: Self) -> Self:
        return self.of(self.value + other.value, np.minimum(self.unit, other.unit), self.reach + other.reach)

    def subtract(self, other: Self) -> Self:
        return self.add(other.negative())

    def negative(self) -> Self:
        return type(self)(-self.value, self.unit, self.reach)

    def multiply(self, other: Self) -> Self:
        return self.of(self.value * other.value, self.unit + other.unit, self.reach * other.reach)

    def divide(self, other: Self) -> Self:
        size = np.abs(other.value)
        mantissa, exponent = np.frexp(size)
        even = (mantissa == 0.5) & (other.reach == size) & np.isfinite(other.unit)  # a power of two, itself exact
        quotient = self.of(self.value / size, self.unit - (exponent - 1), self.reach / size)
        rounded = self.rounded(self.value / other.value)
        return type(self)(
            rounded.value, *(np.where(even, *p) for p in zip(quotient.parts[1:], rounded.parts[1:], strict=True))
        )

    def matmul(self, other: Self) -> Self:
        a, b = (x.unless(~x.within(x.operand_roundoff)) for x in (self, other))
        unit = a.unit.min(axis=-1, initial=np.inf)[..., None] + b.unit.min(axis=-2, initial=np.inf)[..., None, :]
        return self.of(a.value @ b.value, unit, a.reach @ b.reach)

    def sum(self, axis: Any = None, keepdims: Any = False) -> Self:
        unit = self.unit.min(axis=axis, keepdims=keepdims, initial=np.inf)
        return self.of(self.value.sum(axis=axis, keepdims=keepdims), unit, self.reach.sum(axis=axis, keepdims=keepdims))

    def mean(self, axis: Any = None, keepdims: Any = False) -> Self:
        result = super().mean(axis=axis, keepdims=keepdims)
        top, bottom = self.value.max(axis=axis, keepdims=keepdims), self.value.min(axis=axis, keepdims=keepdims)
        return result.unless(np.asarray(top != bottom))

    def segment_sum(self, ids: np.ndarray, count: int) -> Self:
        shape = (count, *self.shape[1:])
        value, unit, reach = np.zeros(shape), np.full(shape, np.inf), np.zeros(shape)
        np.add.at(value, ids, self.value)
        np.minimum.at(unit, ids, self.unit)
        np.add.at(reach, ids, self.reach)
        return self.of(value, unit, reach)

    def max(self, axis: Any = None, keepdims: Any = False) -> Self:
        value, reach = (part.max(axis=axis, keepdims=keepdims) for part in (self.value, self.reach))
        return self.of(value, self.unit.min(axis=axis, keepdims=keepdims), reach)

    def maximum(self, other: Self) -> Self:
        value, reach = np.maximum(self.value, other.value), np.maximum(self.reach, other.reach)
        return self.of(value, np.minimum(self.unit, other.unit), reach)

    def rounded(self, value: np.ndarray) -> Self:
        """What a function makes of this array, or a division: a number that may be rounded."""
        return self.of(value, UNKNOWN, np.maximum(np.abs(value), self.precision.tiny))


for _name in UNARY:
    _function = getattr(numpy_module, _name)
    setattr(Exact, _name, lambda x, function=_function: x.rounded(function(x.value)))


class ExactModule(ReadingModule):
    """With what is `stored`."""

    def stored(self, x: Any) -> Any:
        return self.reading.lift(x).stored()


@cache
def exact_module(precision: str, storage: str | None = None, products: str = "float32") -> ReadingModule:
    """The array module that finds where an evaluation in `precision` cannot round; arguments as of `bounded_module`."""
    kept = None if storage is None else PRECISIONS[storage]
    parts = {"precision": PRECISIONS[precision], "storage": kept, "operand_roundoff": PRODUCTS[products]}
    return ExactModule(type(f"Exact_{precision}_{storage or ''}_{products}", (Exact,), parts))
