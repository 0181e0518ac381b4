"""gelu: y = x Phi(x), Phi the normal distribution function; relu: y = max(x, 0); tanh: y = tanh x.

Hendrycks and Gimpel, "Gaussian error linear units" (2016). `approximate="none"` is the erf form (Hugging Face "gelu"),
"tanh" its tanh approximation ("gelu_new").
gelu_grad: dx = g (Phi(x) + x phi(x)); relu_grad: dx = g where x > 0; tanh_grad: dx = g (1 - y^2).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import pi, sqrt
from typing import Any

import numpy as np

from minibert.kernels.drawing import Drawing
from minibert.kernels.op import Array, BertSize, Op, Sample

SQRT_2_OVER_PI = sqrt(2 / pi)
CUBIC = 0.044715


def gelu_formula(xp: Any, x: Array, *, approximate: str = "none") -> Array:
    if approximate == "tanh":
        return x * 0.5 * (1 + xp.tanh(SQRT_2_OVER_PI * (x + CUBIC * x**3)))
    return x * 0.5 * (1 + xp.erf(x * sqrt(0.5)))


def _gelu_grad(xp: Any, g: Array, x: Array, *, approximate: str = "none") -> Array:
    if approximate == "tanh":
        t = xp.tanh(SQRT_2_OVER_PI * (x + CUBIC * x**3))
        dx = g * 0.5 * ((1 + t) + x * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * x**2))
    else:
        dx = g * (0.5 * (1 + xp.erf(x * sqrt(0.5))) + x * xp.exp(-0.5 * x * x) * sqrt(0.5 / pi))
    return dx


def _relu(xp: Any, x: Array) -> Array:
    return xp.maximum(x, 0.0)


def _relu_grad(xp: Any, g: Array, x: Array) -> Array:
    dx = xp.where(x > 0, g, 0.0)
    return dx


def _tanh(xp: Any, x: Array) -> Array:
    return xp.tanh(x)


def _tanh_grad(xp: Any, g: Array, y: Array) -> Array:
    dx = g * (1 - y * y)
    return dx


def _inputs(rng: np.random.Generator) -> Iterator[np.ndarray]:
    for shape in [(3, 7), (1,), (5, 1031)]:
        yield rng.standard_normal(shape) * 3
    yield np.array([-150.0, -20.0, -5.5, -1e-6, 1e-30, 0.5, 5.5, 20.0, 150.0])  # saturated, and vanishing


def _one(rng: np.random.Generator) -> Iterator[Sample]:
    yield from (Sample((x,)) for x in _inputs(rng))


def _two(rng: np.random.Generator) -> Iterator[Sample]:
    yield from (Sample((rng.standard_normal(x.shape), x)) for x in _inputs(rng))


def _gelu_samples(rng: np.random.Generator, samples: Any = _one) -> Iterator[Sample]:
    for approximate in ("none", "tanh"):
        yield from (Sample(arrays, {"approximate": approximate}) for arrays, _ in samples(rng))


def _tanh_grads(rng: np.random.Generator) -> Iterator[Sample]:
    yield from (Sample((rng.standard_normal(x.shape), np.tanh(x))) for x in _inputs(rng))


def _bench(arrays: int, columns: str = "intermediate") -> Any:
    def bench(rng: np.random.Generator, size: BertSize) -> Sample:
        return Sample(tuple(rng.standard_normal((size.tokens, getattr(size, columns))) for _ in range(arrays)))

    return bench


def _draw_one(draw: Drawing, rows: int, columns: int) -> Sample:
    return Sample((draw.floats(rows, columns),))


def _draw_two(draw: Drawing, rows: int, columns: int) -> Sample:
    return Sample((draw.floats(rows, columns), draw.floats(rows, columns)))


def _draw_gelu(arrays: int) -> Any:
    def draw(draw: Drawing, rows: int, columns: int) -> Sample:
        given = tuple(draw.floats(rows, columns) for _ in range(arrays))
        return Sample(given, {"approximate": draw.among("none", "tanh")})

    return draw


gelu_grad = Op(
    "gelu_grad", _gelu_grad, samples=lambda rng: _gelu_samples(rng, _two), bench=_bench(2), draw=_draw_gelu(2)
)
gelu = Op(
    "gelu",
    gelu_formula,
    samples=_gelu_samples,
    draw=_draw_gelu(1),
    bench=_bench(1),
    vjp=lambda run, g, outs, x, **params: (run(gelu_grad, g, x, **params),),
)
relu_grad = Op("relu_grad", _relu_grad, samples=_two, bench=_bench(2), draw=_draw_two)
relu = Op(
    "relu", _relu, samples=_one, bench=_bench(1), draw=_draw_one, vjp=lambda run, g, outs, x: (run(relu_grad, g, x),)
)
tanh_grad = Op(
    "tanh_grad",
    _tanh_grad,
    samples=_tanh_grads,
    bench=_bench(2, "hidden"),
    draw=lambda draw, rows, columns: Sample((draw.floats(rows, columns), np.tanh(draw.floats(rows, columns)))),
)
tanh = Op(
    "tanh",
    _tanh,
    samples=_one,
    bench=_bench(1, "hidden"),
    draw=_draw_one,
    vjp=lambda run, g, outs, x: (run(tanh_grad, g, outs[0]),),
)
