"""softmax: y = exp(x - max x) / sum exp(x - max x), along the last axis.

softmax_grad: dx = y (g - sum g y).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import Array, BertSize, Op, Sample


def softmax_formula(xp: Any, x: Array) -> Array:
    e = xp.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _softmax_grad(xp: Any, g: Array, y: Array) -> Array:
    dx = y * (g - (g * y).sum(axis=-1, keepdims=True))
    return dx


def _rows(rng: np.random.Generator) -> Iterator[Sample]:
    # (37, 1031) spans many CUDA blocks, and is no power of two; the last two are read in packs of 16 bytes
    for shape in [(3, 7), (1, 1), (2, 4, 33), (37, 1031), (9, 128), (5, 768)]:
        yield Sample((rng.standard_normal(shape) * 3,))
    yield Sample((rng.standard_normal((5, 9)) + 1e4,))  # overflows if the maximum is not taken first
    yield Sample(
        (np.where(rng.random((4, 50)) < 0.5, -1e4, 0.0) + rng.standard_normal((4, 50)),)
    )  # masked, and flushed


def _grad_rows(rng: np.random.Generator) -> Iterator[Sample]:
    for (x,), _ in _rows(rng):
        yield Sample((rng.standard_normal(x.shape), softmax_formula(numpy_module, x)))


def _bench(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample((rng.standard_normal((size.batch * size.heads * size.length, size.length)),))


def _bench_grad(rng: np.random.Generator, size: BertSize) -> Sample:
    (x,), _ = _bench(rng, size)
    return Sample((rng.standard_normal(x.shape), softmax_formula(numpy_module, x)))


softmax_grad = Op(
    "softmax_grad",
    _softmax_grad,
    samples=_grad_rows,
    bench=_bench_grad,
    draw=lambda draw, rows, columns: Sample(
        (draw.floats(rows, columns), softmax_formula(numpy_module, draw.floats(rows, columns)))
    ),
)
softmax = Op(
    "softmax",
    softmax_formula,
    samples=_rows,
    bench=_bench,
    draw=lambda draw, rows, columns: Sample((draw.floats(rows, columns),)),
    vjp=lambda run, g, outs, x: (run(softmax_grad, g, outs[0]),),
)
