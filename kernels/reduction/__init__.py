"""reduce_sum: the sum of x over axes (`axis=None`: all of them).

broadcast: x laid out over new axes, the adjoint of reduce_sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.drawing import Drawing
from minibert.kernels.op import Array, Op, Run, Sample
from minibert.kernels.view import reshape


def _reduce_sum(xp: Any, x: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    return x.sum(axis=axis)


def _broadcast(xp: Any, x: Array, *, shape: tuple[int, ...]) -> Array:
    return xp.broadcast_to(x, shape)


def sum_to(run: Run, g: Array, like: Array) -> Array:
    """The gradient of broadcasting: g summed down to the shape of `like`."""
    if g.shape == like.shape:
        return g
    added = g.ndim - like.ndim
    axes = tuple(i for i in range(g.ndim) if i < added or (like.shape[i - added] == 1 and g.shape[i] != 1))
    return run(reshape, run(reduce_sum, g, axis=axes), shape=like.shape)


def _sum_vjp(run: Run, g: Array, outs: tuple[Array, ...], x: Array, *, axis: Any = None) -> tuple[Array]:
    axes = range(x.ndim) if axis is None else [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return (run(broadcast, run(reshape, g, shape=kept), shape=x.shape),)


def _sums(rng: np.random.Generator) -> Iterator[Sample]:
    for shape, axis in [
        ((3, 7), 0),
        ((2, 3, 5), (0, 2)),
        ((1,), None),
        ((37, 1031), 0),
        ((3, 2053), -1),
        ((2, 40001), -1),
        ((4, 5), None),
    ]:
        yield Sample((rng.standard_normal(shape),), {"axis": axis})
    yield Sample((rng.standard_normal((300, 3)) + 1e4,), {"axis": 0})  # one sign: errors add up


def _draw_sum(draw: Drawing, rows: int, columns: int) -> Sample:
    shape, axes = draw.among(((rows, columns), (0, -1, None, (0, 1))), ((2, rows, columns), (-1, -2, 0, (0, 2))))
    return Sample((draw.floats(*shape),), {"axis": draw.among(*axes)})


def _layouts(rng: np.random.Generator) -> Iterator[Sample]:
    for shape, wide in [((3, 1), (3, 8)), ((5,), (2, 5)), ((), (1031,)), ((1,), (1,))]:
        yield Sample((rng.standard_normal(shape),), {"shape": wide})


reduce_sum = Op(
    "reduce_sum",
    _reduce_sum,
    samples=_sums,
    draw=_draw_sum,
    # Each of its choices, where 16 bits do not count the rows, and where both axes are long.
    sizes=({"rows": 65600, "columns": 3},) * 8 + ({"rows": 517, "columns": 516},) * 8,
    bench=lambda rng, size: Sample((rng.standard_normal((size.tokens, size.intermediate)),), {"axis": 0}),
    vjp=_sum_vjp,
)
broadcast = Op(
    "broadcast",
    _broadcast,
    samples=_layouts,
    draw=lambda draw, rows, columns: Sample(
        (draw.floats(*draw.among((columns,), (rows, 1), (1, columns), ())),), {"shape": (rows, columns)}
    ),
    bench=lambda rng, size: Sample((rng.standard_normal(size.hidden),), {"shape": (size.tokens, size.hidden)}),
    vjp=lambda run, g, outs, x, *, shape: (sum_to(run, g, x),),
)
