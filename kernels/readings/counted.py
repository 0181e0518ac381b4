"""A formula read for its work: arrays that have a shape and no data, and count the operations on them.

Convention: one flop for each element of an elementwise result (exp and erf too), n for a sum of n, 2 m n k for a
product. Nothing is computed on floats, so the shapes of the largest model cost no more than those of a small one.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np

from minibert.kernels.op import Array, Op, holds_floats, outputs
from minibert.kernels.readings.reading import UNARY, Reading, ReadingModule


class Cost(NamedTuple):
    """The work an op cannot avoid: arithmetic, and bytes moved between memory and the chip."""

    flops: int
    bytes: int


class Counted(Reading):
    """A zero-stride view of one zero: any shape, no memory. `flops` is set by `cost`."""

    flops: list[int]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Self:
        return cls(np.broadcast_to(np.float64(0), shape))

    @classmethod
    def lift(cls, x: Any) -> Self:
        return x if isinstance(x, cls) else cls.of(np.shape(x))

    def _elementwise(self, *others: Self) -> Self:
        result = self.of(np.broadcast_shapes(self.shape, *(o.shape for o in others)))
        self.flops[0] += result.size
        return result

    def matmul(self, other: Self) -> Self:
        batch = np.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        result = self.of((*batch, self.shape[-2], other.shape[-1]))
        self.flops[0] += 2 * result.size * self.shape[-1]
        return result

    def sum(self, axis: Any = None, keepdims: bool = False) -> Self:
        self.flops[0] += self.size
        axes = range(self.ndim) if axis is None else [a % self.ndim for a in np.atleast_1d(axis)]
        kept = [1 if i in axes else n for i, n in enumerate(self.shape) if keepdims or i not in axes]
        return self.of(tuple(kept))

    def max(self, axis: Any = None, keepdims: bool = False) -> Self:
        return self.sum(axis=axis, keepdims=keepdims)

    def segment_sum(self, ids: np.ndarray, count: int) -> Self:
        self.flops[0] += self.size
        return self.of((count, *self.shape[1:]))


for _name in ("add", "subtract", "multiply", "divide", "maximum", "negative", *UNARY):
    setattr(Counted, _name, Counted._elementwise)


class CountingModule(ReadingModule):
    """`where`, `concatenate` and products of integers make no data either."""

    def integer_matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        self.reading.flops[0] += 2 * a.shape[0] * b.shape[1] * a.shape[1]
        return np.broadcast_to(np.int64(0), (a.shape[0], b.shape[1]))

    def where(self, condition: np.ndarray, a: Any, b: Any) -> Counted:
        return self.reading.of(
            np.broadcast_shapes(np.shape(condition), self.reading.lift(a).shape, self.reading.lift(b).shape)
        )

    def concatenate(self, arrays: Any, axis: int = 0) -> Counted:
        shapes = [self.reading.lift(a).shape for a in arrays]
        axis %= len(shapes[0])
        return self.reading.of((*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :]))


def cost(op: Op, *arrays: Array, **params: Any) -> Cost:
    """The flops and bytes of one call, from shapes and dtypes (and the contents of integer arrays) alone."""
    reading: type[Counted] = type("Counting", (Counted,), {"flops": [0]})
    floats = [holds_floats(a) for a in arrays]
    results = op.formula(
        CountingModule(reading),
        *(reading.of(a.shape) if f else np.asarray(a) for a, f in zip(arrays, floats, strict=True)),
        **params,
    )
    if op.bytes is not None:
        return Cost(reading.flops[0], op.bytes(*arrays, **params))
    itemsize = max((a.dtype.itemsize for a, f in zip(arrays, floats, strict=True) if f), default=4)
    moved = sum(a.nbytes for a in arrays) + sum(r.size * itemsize for r in outputs(results))
    return Cost(reading.flops[0], moved)
