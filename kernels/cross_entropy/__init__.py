"""cross_entropy: loss = mean over rows of log sum exp(z) - z[label]; keeps dlogits = (softmax(z) - onehot) / rows.

A row whose label is `IGNORED` counts for nothing: the mean is over the others (0 where there is none), and its dlogits
are 0.
linear_cross_entropy: loss = mean over rows of log sum exp(z) - z[label], z = x W' + b: decoder and loss in one op, so
that the logits live once, and are overwritten by their gradient.
Shapes: z (M, V), labels (M,) in [0, V) or IGNORED, x (M, C), W (V, C), b (V,); loss ().
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.drawing import IGNORED, Drawing
from minibert.kernels.elementwise import mul
from minibert.kernels.linear import matmul, parameter_gradients, wanted
from minibert.kernels.op import Array, BertSize, Op, Run, Sample


def _cross_entropy(xp: Any, logits: Array, labels: Array) -> tuple[Array, Array]:
    kept = labels != IGNORED
    count = max(1, int(kept.sum()))
    top = logits.max(axis=-1, keepdims=True)
    e = xp.exp(logits - top)
    total = e.sum(axis=-1, keepdims=True)
    rows, columns = xp.arange(logits.shape[0]), labels * kept  # an ignored row names column 0, and is left out below
    losses = xp.log(total[:, 0]) - (logits - top)[rows, columns]
    hit = labels[:, None] == xp.arange(logits.shape[1])
    p = e / total
    loss = xp.where(kept, losses, 0.0).sum() / count
    dlogits = xp.where(kept[:, None], xp.where(hit, p - 1, p), 0.0) / count
    return loss, dlogits


def _linear_cross_entropy(xp: Any, x: Array, weight: Array, bias: Array, labels: Array) -> tuple[Array, Array]:
    loss, dlogits = _cross_entropy(xp, xp.stored(x @ weight.swapaxes(0, 1) + bias), labels)
    return loss, dlogits


def _linear_cross_entropy_vjp(
    run: Run, g: Array, outs: tuple[Array, ...], x: Array, weight: Array, bias: Array, labels: Array
) -> tuple[Any, ...]:
    dlogits = outs[1]  # g is a number: it is cheapest to scale the small arrays
    dx = run(mul, run(matmul, dlogits, weight), g) if wanted(run, 0) else None
    if not wanted(run, 1, 2):
        return dx, None, None, None
    dweight, total = parameter_gradients(run, dlogits, run(mul, x, g), 1)
    return dx, dweight, run(mul, total, g), None


def _some_labels(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """A label for each row; where there are many rows, some are ignored, the first among them."""
    labels = rng.integers(0, classes, rows)
    labels[: max(0, rows - 5) : 4] = IGNORED
    return labels


def _samples(rng: np.random.Generator) -> Iterator[Sample]:
    for rows, classes, offset in [(3, 7, 0), (1, 2, 0), (37, 1031, 0), (4, 9, 1e4)]:
        yield Sample((rng.standard_normal((rows, classes)) * 3 + offset, _some_labels(rng, rows, classes)))
    yield Sample((rng.standard_normal((2, 5)), np.full(2, IGNORED)))


def _linear_samples(rng: np.random.Generator) -> Iterator[Sample]:
    for rows, inputs, classes in [(3, 4, 7), (1, 1, 2), (37, 33, 1031), (8, 5, 12)]:
        arrays = (rng.standard_normal(s) for s in ((rows, inputs), (classes, inputs), (classes,)))
        yield Sample((*arrays, _some_labels(rng, rows, classes)))


def _draw_linear(draw: Drawing, rows: int, inputs: int, classes: int) -> Sample:
    arrays = draw.floats(rows, inputs), draw.floats(classes, inputs), draw.floats(classes)
    return Sample((*arrays, draw.labels(rows, classes)))


def _bench(rng: np.random.Generator, size: BertSize) -> Sample:
    labels = rng.integers(0, size.vocabulary, size.predicted)
    return Sample((rng.standard_normal((size.predicted, size.vocabulary)), labels))


def _bench_linear(rng: np.random.Generator, size: BertSize) -> Sample:
    x, weight = (rng.standard_normal((n, size.hidden)) * 0.2 for n in (size.predicted, size.vocabulary))
    return Sample((x, weight, rng.standard_normal(size.vocabulary), rng.integers(0, size.vocabulary, size.predicted)))


cross_entropy = Op(
    "cross_entropy",
    _cross_entropy,
    samples=_samples,
    draw=lambda draw, rows, classes: Sample((draw.floats(rows, classes), draw.labels(rows, classes))),
    bench=_bench,
    vjp=lambda run, g, outs, logits, labels: (run(mul, outs[1], g), None),
    wide_outputs=(0,),
)
linear_cross_entropy = Op(
    "linear_cross_entropy",
    _linear_cross_entropy,
    samples=_linear_samples,
    draw=_draw_linear,
    bench=_bench_linear,
    vjp=_linear_cross_entropy_vjp,
    wide_outputs=(0,),
)
