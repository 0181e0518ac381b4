"""layer_norm: y = (x - mean) rstd w + b over the last axis; keeps mean and rstd = 1 / sqrt(var + eps).

add_layer_norm: y = (z - mean) rstd w + b over the last axis, z = dropout(x) + residual, the end of every BERT block;
keeps z, and its mean and rstd.
Ba, Kiros, Hinton, "Layer normalization" (2016), equation 4. Shapes: x (N, C), w and b (C,), mean and rstd (N,).

layer_norm_grad: n = (x - mean) rstd, h = g w: dx = (h - mean h - n mean(h n)) rstd, dw = sum g n, db = sum g.
add_layer_norm_grad: n = (z - mean) rstd, h = g w: dresidual = (h - mean h - n mean(h n)) rstd, dx = dropout(dresidual),
dw = sum g n, db = sum g.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.array_module import numpy_module
from minibert.kernels.drawing import Drawing
from minibert.kernels.dropout import dropout_formula
from minibert.kernels.op import Array, BertSize, Op, Run, Sample
from minibert.kernels.philox import NO_STREAM, Stream


def _layer_norm(xp: Any, x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> tuple[Array, Array, Array]:
    mean, d, rstd = _statistics(xp, x, eps)
    y = d * rstd[:, None] * weight + bias
    return y, mean, rstd


def _statistics(xp: Any, x: Array, eps: float) -> tuple[Array, Array, Array]:
    """mean, x - mean, rstd."""
    mean = x.mean(axis=-1)
    d = x - mean[:, None]
    return mean, d, 1 / xp.sqrt((d * d).mean(axis=-1) + eps)


def _kept(xp: Any, g: Array, x: Array, *_: Array, eps: float = 1e-12, **__: Any) -> dict[int, Array]:
    """mean and rstd, of x or of the z of add_layer_norm; with another eps a gradient has no way to make rstd again."""
    mean, _d, rstd = _statistics(xp, x, eps)
    return {3: mean, 4: rstd}


def _layer_norm_grad(xp: Any, g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    n = (x - mean[:, None]) * rstd[:, None]
    h = g * weight
    dx = (h - h.mean(axis=-1, keepdims=True) - n * (h * n).mean(axis=-1, keepdims=True)) * rstd[:, None]
    dw, db = (g * n).sum(axis=0), g.sum(axis=0)
    return dx, dw, db


def _add_layer_norm(
    xp: Any, x: Array, residual: Array, weight: Array, bias: Array,
    *, eps: float = 1e-12, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> tuple[Array, ...]:  # fmt: skip
    z = dropout_formula(xp, x, rate=rate, stream=stream) + residual
    y, mean, rstd = _layer_norm(xp, z, weight, bias, eps=eps)
    return y, z, mean, rstd


def _add_layer_norm_grad(
    xp: Any, g: Array, z: Array, weight: Array, mean: Array, rstd: Array,
    *, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> tuple[Array, ...]:  # fmt: skip
    dresidual, dw, db = _layer_norm_grad(xp, g, z, weight, mean, rstd)
    dx = dropout_formula(xp, dresidual, rate=rate, stream=stream)
    return dx, dresidual, dw, db


def _layer_norm_vjp(
    run: Run, g: Array, outs: tuple[Array, ...], x: Array, w: Array, b: Array, **_: Any
) -> tuple[Any, ...]:
    return run(layer_norm_grad, g, x, w, *outs[1:])


def _add_layer_norm_vjp(
    run: Run, g: Array, outs: tuple[Array, ...], x: Array, residual: Array, weight: Array, bias: Array,
    *, eps: float = 1e-12, **dropout: Any,
) -> tuple[Any, ...]:  # fmt: skip
    return run(add_layer_norm_grad, g, outs[1], weight, *outs[2:], **dropout)


def _rows(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    for rows, columns, offset in [(3, 7, 0), (1, 2, 0), (37, 1031, 0), (70, 129, 0), (4, 33, 100), (37, 768, 0)]:
        yield (rng.standard_normal((rows, columns)) + offset, *rng.standard_normal((2, columns)))


def _streams(rng: np.random.Generator) -> Iterator[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    for i, arrays in enumerate(_rows(rng)):
        yield arrays, {"rate": (0.5, 0.1, 0.1, 0.0, 0.5, 0.1)[i], "stream": Stream(3, 17, 2, i)}


def _samples(rng: np.random.Generator) -> Iterator[Sample]:
    yield from (Sample(arrays) for arrays in _rows(rng))
    yield Sample((rng.standard_normal((3, 7)), *rng.standard_normal((2, 7))), {"eps": 0.1})  # not lost in the variance


def _grad_samples(rng: np.random.Generator) -> Iterator[Sample]:
    for x, w, b in _rows(rng):
        yield Sample((rng.standard_normal(x.shape), x, w, *_layer_norm(numpy_module, x, w, b)[1:]))


def _add_samples(rng: np.random.Generator) -> Iterator[Sample]:
    for (x, w, b), params in _streams(rng):
        yield Sample((x, rng.standard_normal(x.shape), w, b), params)
    yield Sample((*rng.standard_normal((2, 3, 7)), *rng.standard_normal((2, 7))), {"eps": 0.1})


def _add_grad_samples(rng: np.random.Generator) -> Iterator[Sample]:
    for (x, w, b), params in _streams(rng):
        yield Sample((rng.standard_normal(x.shape), x, w, *_layer_norm(numpy_module, x, w, b)[1:]), params)


def _draw(grad: bool, add: bool) -> Any:
    def draw(draw: Drawing, rows: int, columns: int) -> Sample:
        x, w, b = draw.floats(rows, columns), draw.floats(columns), draw.floats(columns)
        params = {"rate": draw.among(0.5, 0.1, 0.0), "stream": draw.stream()} if add else {}
        if grad:
            statistics = _layer_norm(numpy_module, x, w, b)[1:]
            return Sample((draw.floats(rows, columns), x, w, *statistics), params)
        params["eps"] = draw.among(1e-12, 0.1)
        return Sample((x, draw.floats(rows, columns), w, b) if add else (x, w, b), params)

    return draw


def _bench(grad: bool, add: bool) -> Any:
    def bench(rng: np.random.Generator, size: BertSize) -> Sample:
        x, g = rng.standard_normal((2, size.tokens, size.hidden))
        w, b = rng.standard_normal((2, size.hidden))
        params = {"rate": 0.1, "stream": Stream(1, 17, 1, 1)} if add else {}
        if grad:
            return Sample((g, x, w, *_layer_norm(numpy_module, x, w, b)[1:]), params)
        return Sample((x, g, w, b) if add else (x, w, b), params)

    return bench


def _add_layer_norm_again(
    run: Run, kept: tuple[Array, ...], x: Array, residual: Array, weight: Array, bias: Array, *, eps: float, **_: Any
) -> Array:
    return run(layer_norm, kept[0], weight, bias, eps=eps)[0]


layer_norm_grad = Op(
    "layer_norm_grad", _layer_norm_grad, samples=_grad_samples, bench=_bench(grad=True, add=False),
    draw=_draw(grad=True, add=False), kept=_kept, wide_inputs=(3, 4),
)  # fmt: skip
layer_norm = Op(
    "layer_norm", _layer_norm, samples=_samples, bench=_bench(grad=False, add=False), vjp=_layer_norm_vjp,
    draw=_draw(grad=False, add=False),
    wide_outputs=(1, 2),
)  # fmt: skip
add_layer_norm_grad = Op(
    "add_layer_norm_grad", _add_layer_norm_grad, samples=_add_grad_samples, bench=_bench(grad=True, add=True),
    draw=_draw(grad=True, add=True), kept=_kept, wide_inputs=(3, 4),
)  # fmt: skip
add_layer_norm = Op(
    "add_layer_norm", _add_layer_norm, samples=_add_samples, bench=_bench(grad=False, add=True),
    vjp=_add_layer_norm_vjp, again=_add_layer_norm_again, draw=_draw(grad=False, add=True), wide_outputs=(2, 3),
)  # fmt: skip
