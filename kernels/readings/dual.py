"""A formula read for its derivative: arrays that carry the tangent along one direction.

Forward-mode differentiation on dual numbers (Griewank and Walther, Evaluating Derivatives, ch. 3): exact to rounding,
with no step size. <J v, w> from here against <v, vjp(w)> checks a gradient to about 1e-13.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from minibert.kernels.array_module import numpy_module
from minibert.kernels.readings.reading import Reading, ReadingModule


class Dual(Reading):
    """value and tangent, both float64."""

    width = 2

    @property
    def tangent(self) -> np.ndarray:
        return self.parts[1]

    def _chain(self, value: np.ndarray, slope: np.ndarray) -> Self:
        return type(self)(value, slope * self.tangent)

    def add(self, other: Self) -> Self:
        return type(self)(self.value + other.value, self.tangent + other.tangent)

    def subtract(self, other: Self) -> Self:
        return type(self)(self.value - other.value, self.tangent - other.tangent)

    def multiply(self, other: Self) -> Self:
        return type(self)(self.value * other.value, self.tangent * other.value + self.value * other.tangent)

    def divide(self, other: Self) -> Self:
        value = self.value / other.value
        return type(self)(value, (self.tangent - value * other.tangent) / other.value)

    def matmul(self, other: Self) -> Self:
        return type(self)(self.value @ other.value, self.tangent @ other.value + self.value @ other.tangent)

    def sum(self, axis: Any = None, keepdims: Any = False) -> Self:
        return self.each(lambda part: np.asarray(part.sum(axis=axis, keepdims=keepdims)))

    def segment_sum(self, ids: np.ndarray, count: int) -> Self:
        return self.each(lambda part: numpy_module.segment_sum(part, ids, count))

    def max(self, axis: Any = None, keepdims: Any = False) -> Self:
        where = np.expand_dims(self.value.argmax(axis), axis)
        top = self.each(lambda part: np.take_along_axis(part, where, axis))
        return top if keepdims else top.each(lambda part: part.squeeze(axis))

    def maximum(self, other: Self) -> Self:
        first = self.value > other.value  # at a tie the second wins: relu'(0) = 0, as everywhere in the field
        return type(self)(*(np.where(first, a, b) for a, b in zip(self.parts, other.parts, strict=True)))

    def exp(self) -> Self:
        value = np.exp(self.value)
        return self._chain(value, value)

    def log(self) -> Self:
        return self._chain(np.log(self.value), 1 / self.value)

    def sqrt(self) -> Self:
        value = np.sqrt(self.value)
        return self._chain(value, 0.5 / value)

    def tanh(self) -> Self:
        value = np.tanh(self.value)
        return self._chain(value, 1 - value * value)

    def rint(self) -> Self:
        return self._chain(np.rint(self.value), np.zeros_like(self.value))

    def erf(self) -> Self:
        return self._chain(numpy_module.erf(self.value), 2 / np.sqrt(np.pi) * np.exp(-self.value * self.value))


dual_module = ReadingModule(Dual)
