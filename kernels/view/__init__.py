"""reshape: x in another shape; transpose: x with its axes in another order; slice_axis: rows start .. stop of one axis.

pad_axis: x between zeros along one axis, the adjoint of slice_axis; concatenate: arrays one after the other along an
axis. No arithmetic, so no kernel: a backend's array module does them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from minibert.kernels.op import Array, BertSize, Op, Run, Sample


def _reshape(xp: Any, x: Array, *, shape: tuple[int, ...]) -> Array:
    return x.reshape(shape)


def _transpose(xp: Any, x: Array, *, axes: tuple[int, ...]) -> Array:
    return x.transpose(axes)


def _slice_axis(xp: Any, x: Array, *, axis: int, start: int, stop: int) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop),)]


def _pad_axis(xp: Any, x: Array, *, axis: int, before: int, after: int) -> Array:
    def zeros(count: int) -> Array:
        return xp.zeros((*x.shape[:axis], count, *x.shape[axis + 1 :]), getattr(x, "dtype", None))

    return xp.concatenate([zeros(before), x, zeros(after)], axis=axis)


def _concatenate(xp: Any, *arrays: Array, axis: int) -> Array:
    return xp.concatenate(arrays, axis=axis)


def _concatenate_vjp(run: Run, g: Array, outs: tuple[Array, ...], *arrays: Array, axis: int) -> tuple[Array, ...]:
    ends: list[int] = list(accumulate(a.shape[axis] for a in arrays))
    return tuple(run(slice_axis, g, axis=axis, start=a, stop=b) for a, b in pairwise([0, *ends]))


def _with(*cases: tuple[tuple[int, ...], dict[str, Any]]) -> Callable[[np.random.Generator], Iterator[Sample]]:
    def samples(rng: np.random.Generator) -> Iterator[Sample]:
        for shape, params in cases:
            yield Sample((rng.standard_normal(shape),), params)

    return samples


def _drawn(params: Callable[[int, int], dict[str, Any]]) -> Callable[..., Sample]:
    return lambda draw, rows, columns: Sample((draw.floats(rows, columns),), params(rows, columns))


def _bench(**params: Any) -> Callable[[np.random.Generator, BertSize], Sample]:
    return lambda rng, size: Sample((rng.standard_normal((size.tokens, size.hidden)),), params)


def _parts(rng: np.random.Generator) -> Iterator[Sample]:
    for axis, *shapes in [(0, (2, 3), (5, 3)), (1, (3, 1), (3, 4), (3, 2)), (0, (1,)), (0, (1031, 3), (7, 3))]:
        yield Sample(tuple(rng.standard_normal(s) for s in shapes), {"axis": axis})


reshape: Op = Op(
    "reshape",
    _reshape,
    samples=_with(((3, 8), {"shape": (2, 12)}), ((1,), {"shape": ()}), ((5, 1031), {"shape": (1031, 5)})),
    bench=_bench(shape=(-1,)),
    draw=_drawn(lambda rows, columns: {"shape": (columns, rows)}),
    vjp=lambda run, g, outs, x, *, shape: (run(reshape, g, shape=x.shape),),
)
transpose: Op = Op(
    "transpose",
    _transpose,
    samples=_with(((3, 8), {"axes": (1, 0)}), ((1, 2, 3), {"axes": (2, 0, 1)}), ((7, 1031), {"axes": (1, 0)})),
    bench=_bench(axes=(1, 0)),
    draw=_drawn(lambda rows, columns: {"axes": (1, 0)}),
    vjp=lambda run, g, outs, x, *, axes: (run(transpose, g, axes=tuple(int(i) for i in np.argsort(axes))),),
)
slice_axis = Op(
    "slice_axis",
    _slice_axis,
    samples=_with(((6, 8), {"axis": 0, "start": 1, "stop": 4}), ((3, 1031), {"axis": 1, "start": 0, "stop": 1030})),
    bench=_bench(axis=1, start=0, stop=64),
    draw=_drawn(lambda rows, columns: {"axis": 1, "start": columns // 3, "stop": columns}),
    vjp=lambda run, g, outs, x, *, axis, start, stop: (
        run(pad_axis, g, axis=axis, before=start, after=x.shape[axis] - stop),
    ),
)
pad_axis: Op = Op(
    "pad_axis",
    _pad_axis,
    samples=_with(((3, 8), {"axis": 0, "before": 1, "after": 2}), ((3, 1031), {"axis": 1, "before": 0, "after": 1})),
    bench=_bench(axis=0, before=8, after=8),
    draw=_drawn(lambda rows, columns: {"axis": 0, "before": 1, "after": 2}),
    vjp=lambda run, g, outs, x, *, axis, before, after: (
        run(slice_axis, g, axis=axis, start=before, stop=before + x.shape[axis]),
    ),
)
concatenate = Op(
    "concatenate",
    _concatenate,
    samples=_parts,
    draw=lambda draw, rows, columns: Sample((draw.floats(rows, columns), draw.floats(rows + 1, columns)), {"axis": 0}),
    bench=lambda rng, size: Sample(
        tuple(rng.standard_normal((size.hidden, size.hidden)) for _ in range(3)), {"axis": 0}
    ),
    vjp=_concatenate_vjp,
)
