"""dropout: y = x / (1 - p) where a Philox word is at least p 2^32, else 0; its own adjoint.

Srivastava et al., "Dropout" (2014), inverted. Element i draws element i of `stream`, so every backend keeps the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.op import Array, Op, Sample
from minibert.kernels.philox import Stream, keep_mask


def dropout_formula(xp: Any, x: Array, *, rate: float, stream: Stream) -> Array:
    if rate == 0:
        return x
    return xp.where(keep_mask(xp, stream, x.shape, rate), x * (1 / (1 - rate)), 0.0)


def _samples(rng: np.random.Generator) -> Iterator[Sample]:
    for shape, rate in [((3, 7), 0.5), ((1,), 0.1), ((5, 1031), 0.1), ((4, 5), 0.0), ((2, 3, 5), 0.9)]:
        yield Sample((rng.standard_normal(shape),), {"rate": rate, "stream": Stream(2**32 - 1, 16, 7, 3)})


dropout: Op = Op(
    "dropout",
    dropout_formula,
    samples=_samples,
    draw=lambda draw, rows, columns: Sample(
        (draw.floats(rows, columns),), {"rate": draw.among(0.5, 0.1, 0.0, 0.9), "stream": draw.stream()}
    ),
    bench=lambda rng, size: Sample(
        (rng.standard_normal((size.tokens, size.hidden)),), {"rate": 0.1, "stream": Stream(1, 16, 1, 1)}
    ),
    vjp=lambda run, g, outs, x, **params: (run(dropout, g, **params),),
)
