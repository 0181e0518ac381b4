"""What every reading of a formula shares: the list of primitives, each either structural or arithmetic.

A reading is an array that carries further arrays of the same shape beside its value (an error bound, a derivative).
Structural primitives (reshape, indexing, where ...) move all of them alike and are written here, once. Arithmetic ones
are what a reading is about: a subclass defines `ARITHMETIC` and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np

from minibert.kernels.array_module import numpy_module

UNARY = ("exp", "log", "sqrt", "tanh", "erf", "rint")
ARITHMETIC = (
    "add", "subtract", "multiply", "divide", "negative", "matmul", "sum", "max", "maximum", "segment_sum", *UNARY,
)  # fmt: skip


class Reading:
    """An array of `parts`: the value first, then what this reading carries beside it."""

    __array_ufunc__ = None  # NumPy hands `array + reading` to the reading
    width = 1  # how many parts

    def __init__(self, *parts: np.ndarray) -> None:
        self.parts = parts

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("the formula uses a primitive that readings do not know: see kernels/array_module.py")

    @classmethod
    def lift(cls, x: Any) -> Self:
        """A constant: exact, and of derivative zero."""
        if isinstance(x, cls):
            return x
        value = np.asarray(x, np.float64)
        return cls(value, *(np.zeros_like(value) for _ in range(cls.width - 1)))

    @property
    def value(self) -> np.ndarray:
        return self.parts[0]

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)

    def __len__(self) -> int:
        return len(self.value)

    # structural: every part alike
    def each(self, move: Callable[[np.ndarray], np.ndarray]) -> Self:
        return type(self)(*(move(part) for part in self.parts))

    def __getitem__(self, key: Any) -> Self:
        return self.each(lambda part: part[key])

    def reshape(self, *shape: Any) -> Self:
        return self.each(lambda part: part.reshape(*shape))

    def swapaxes(self, a: int, b: int) -> Self:
        return self.each(lambda part: part.swapaxes(a, b))

    def transpose(self, *axes: Any) -> Self:
        return self.each(lambda part: part.transpose(*axes))

    # arithmetic, by a subclass
    def add(self, other: Self) -> Self:
        raise NotImplementedError

    subtract = multiply = divide = matmul = maximum = add

    def negative(self) -> Self:
        return type(self).lift(0.0) - self

    def sum(self, axis: Any = None, keepdims: bool = False) -> Self:
        raise NotImplementedError

    max = sum

    # operators, in terms of the above
    def __add__(self, other: Any) -> Self:
        return self.add(self.lift(other))

    def __sub__(self, other: Any) -> Self:
        return self.subtract(self.lift(other))

    def __mul__(self, other: Any) -> Self:
        return self.multiply(self.lift(other))

    def __truediv__(self, other: Any) -> Self:
        return self.divide(self.lift(other))

    def __matmul__(self, other: Any) -> Self:
        return self.matmul(self.lift(other))

    def __radd__(self, other: Any) -> Self:
        return self.lift(other) + self

    def __rsub__(self, other: Any) -> Self:
        return self.lift(other) - self

    def __rmul__(self, other: Any) -> Self:
        return self.lift(other) * self

    def __rtruediv__(self, other: Any) -> Self:
        return self.lift(other) / self

    def __rmatmul__(self, other: Any) -> Self:
        return self.lift(other) @ self

    def __neg__(self) -> Self:
        return self.negative()

    def __pow__(self, exponent: int) -> Self:
        if not isinstance(exponent, int) or exponent < 1:
            raise TypeError(f"readings know whole powers from 1 on, got {exponent!r}: write it by other primitives")
        result = self
        for _ in range(exponent - 1):
            result = result * self
        return result

    def mean(self, axis: Any = None, keepdims: bool = False) -> Self:
        total = self.sum(axis=axis, keepdims=keepdims)
        return total / float(self.size // max(1, total.size))

    def _compare(self, other: Any, relation: Callable[[Any, Any], Any]) -> np.ndarray:
        return relation(self.value, other.value if isinstance(other, Reading) else other)

    def __gt__(self, other: Any) -> np.ndarray:
        return self._compare(other, operator.gt)

    def __lt__(self, other: Any) -> np.ndarray:
        return self._compare(other, operator.lt)

    def __ge__(self, other: Any) -> np.ndarray:
        return self._compare(other, operator.ge)

    def __le__(self, other: Any) -> np.ndarray:
        return self._compare(other, operator.le)

    def __eq__(self, other: Any) -> np.ndarray:  # type: ignore[override]
        return self._compare(other, operator.eq)

    def __ne__(self, other: Any) -> np.ndarray:  # type: ignore[override]
        return self._compare(other, operator.ne)

    __hash__ = object.__hash__


class ReadingModule:
    """The array module of one reading: its own primitives on floats, NumPy's on integers."""

    def __init__(self, reading: type[Any]) -> None:
        self.reading = reading
        for name in UNARY:
            setattr(self, name, partial(self._unary, getattr(reading, name)))

    def _unary(self, function: Callable[[Any], Any], x: Any) -> Any:
        return function(self.reading.lift(x))

    def maximum(self, a: Any, b: Any) -> Any:
        return self.reading.lift(a).maximum(self.reading.lift(b))

    def segment_sum(self, rows: Any, ids: np.ndarray, count: int) -> Any:
        return rows.segment_sum(ids, count)

    def where(self, condition: np.ndarray, a: Any, b: Any) -> Any:
        a, b = self.reading.lift(a), self.reading.lift(b)
        return self.reading(*(np.where(condition, x, y) for x, y in zip(a.parts, b.parts, strict=True)))

    def concatenate(self, arrays: Any, axis: int = 0) -> Any:
        lifted = [self.reading.lift(a) for a in arrays]
        return self.reading(*(np.concatenate(parts, axis) for parts in zip(*(a.parts for a in lifted), strict=True)))

    def stored(self, x: Any) -> Any:
        return x

    def as_floats(self, whole: np.ndarray, like: Any) -> Any:
        return self.reading.lift(np.asarray(whole, np.float64))

    def integer_matmul(self, a: np.ndarray, b: np.ndarray) -> Any:
        return numpy_module.integer_matmul(a, b)

    def broadcast_to(self, x: Any, shape: tuple[int, ...]) -> Any:
        return x.each(lambda part: np.broadcast_to(part, shape))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
