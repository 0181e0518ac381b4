"""add: a + b; mul: a b; scale: a * factor; where: a if condition else b. Operands broadcast as in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.drawing import Drawing
from minibert.kernels.op import Array, BertSize, Op, Run, Sample
from minibert.kernels.reduction import sum_to


def _add(xp: Any, a: Array, b: Array) -> Array:
    return a + b


def _mul(xp: Any, a: Array, b: Array) -> Array:
    return a * b


def _scale(xp: Any, a: Array, *, factor: float) -> Array:
    return a * factor


def _where(xp: Any, condition: Array, a: Array, b: Array) -> Array:
    return xp.where(condition, a, b)


def _pairs(rng: np.random.Generator) -> Iterator[Sample]:
    for a, b in [
        ((3, 7), (3, 7)),
        ((1,), (1,)),
        ((5, 1031), (5, 1031)),
        ((4, 3, 5), (3, 1)),
        ((2, 6), ()),
        ((1, 4), (3, 1)),
    ]:
        yield Sample((rng.standard_normal(a), rng.standard_normal(b)))
    yield Sample((rng.standard_normal((3, 9)) + 1e4, rng.standard_normal((3, 9)) - 1e4))  # cancels


def _two_rows(rng: np.random.Generator, size: BertSize) -> Sample:
    shape = (size.tokens, size.hidden)
    return Sample((rng.standard_normal(shape), rng.standard_normal(shape)))


def _one(rng: np.random.Generator) -> Iterator[Sample]:
    for shape, factor in [((3, 7), 0.125), ((1,), -3.0), ((5, 1031), 1 / 3), ((), 2.5)]:
        yield Sample((rng.standard_normal(shape),), {"factor": factor})


def _choices(rng: np.random.Generator) -> Iterator[Sample]:
    for condition, a, b in [
        ((3, 7), (3, 7), (3, 7)),
        ((1,), (1,), (1,)),
        ((2, 1, 1, 5), (2, 3, 4, 5), ()),
        ((5, 1031), (5, 1031), ()),
    ]:
        yield Sample((rng.random(condition) < 0.6, rng.standard_normal(a), rng.standard_normal(b)))


def _draw_pair(draw: Drawing, rows: int, columns: int) -> Sample:
    other = draw.among((rows, columns), (columns,), (rows, 1), ())
    return Sample((draw.floats(rows, columns), draw.floats(*other)))


def _draw_scale(draw: Drawing, rows: int, columns: int) -> Sample:
    return Sample((draw.floats(rows, columns),), {"factor": draw.among(0.125, -3.0, 1 / 3, 1.0, 0.0)})


def _draw_choice(draw: Drawing, rows: int, columns: int) -> Sample:
    flags = draw.flags(*draw.among((rows, columns), (rows, 1)))
    return Sample((flags, draw.floats(rows, columns), draw.floats(*draw.among((rows, columns), ()))))


add = Op(
    "add",
    _add,
    samples=_pairs,
    draw=_draw_pair,
    bench=_two_rows,
    vjp=lambda run, g, outs, a, b: (sum_to(run, g, a), sum_to(run, g, b)),
)
mul: Op = Op(
    "mul",
    _mul,
    samples=_pairs,
    draw=_draw_pair,
    bench=_two_rows,
    vjp=lambda run, g, outs, a, b: (sum_to(run, run(mul, g, b), a), sum_to(run, run(mul, g, a), b)),
)
scale: Op = Op(
    "scale",
    _scale,
    samples=_one,
    draw=lambda draw, rows, columns: Sample(
        (draw.floats(rows, columns),), {"factor": draw.among(0.125, -3.0, 1 / 3, 1.0, 0.0)}
    ),
    bench=lambda rng, size: Sample((rng.standard_normal((size.tokens, size.hidden)),), {"factor": 0.125}),
    vjp=lambda run, g, outs, a, *, factor: (run(scale, g, factor=factor),),
)


def _where_vjp(run: Run, g: Array, outs: tuple[Array, ...], condition: Array, a: Array, b: Array) -> tuple[Any, ...]:
    zero = run(scale, g, factor=0.0)
    return None, sum_to(run, run(where, condition, g, zero), a), sum_to(run, run(where, condition, zero, g), b)


where = Op(
    "where",
    _where,
    samples=_choices,
    draw=_draw_choice,
    bench=lambda rng, size: Sample((rng.random((size.tokens, size.hidden)) < 0.9, *_two_rows(rng, size).arrays)),
    vjp=_where_vjp,
)
