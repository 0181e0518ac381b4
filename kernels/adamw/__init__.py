"""adamw: m += (1 - b1)(g s - m), v += (1 - b2)((g s)^2 - v), p = p (1 - lr wd) - lr m^ / (sqrt(v^) + eps).

Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2; m^ = m / (1 - b1^t) and
v^ = v / (1 - b2^t). One flat call for all parameters of a group; p, m and v are updated in place. s, a 0-d array,
scales the gradient: it carries the clipping by global norm (Pascanu et al. 2013), min(1, max_norm / norm).
adamw_shadow: p, m, v = adamw(p, g, m, v, s), shadow = p as the model uses it (in 16 bits on a GPU), all in place.
square_norm: sum x^2; clip_scale: s = min(1, max_norm / sqrt(square norm)).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.drawing import Drawing
from minibert.kernels.elementwise import mul, scale
from minibert.kernels.op import Array, BertSize, Op, Sample


def _adamw(
    xp: Any, param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array,
    *, lr: float, step: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
) -> tuple[Array, Array, Array]:  # fmt: skip
    grad = grad * grad_scale
    exp_avg = exp_avg * beta1 + grad * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    denominator = xp.sqrt(exp_avg_sq) / (1 - beta2**step) ** 0.5 + eps
    update = exp_avg * (lr / (1 - beta1**step)) / denominator
    return param * (1 - lr * weight_decay) - update, exp_avg, exp_avg_sq


def _adamw_shadow(
    xp: Any, shadow: Array, param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array,
    **numbers: Any,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    param, exp_avg, exp_avg_sq = _adamw(xp, param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers)
    return param, param, exp_avg, exp_avg_sq


def _square_norm(xp: Any, x: Array) -> Array:
    return (x * x).sum()


def _clip_scale(xp: Any, square_norm: Array, *, max_norm: float) -> Array:
    norm = xp.sqrt(square_norm) + 1e-6  # the constant of torch.nn.utils.clip_grad_norm_
    s = -xp.maximum(-(max_norm / norm), -1.0)
    return s


def _state(rng: np.random.Generator, count: int, size: float = 1e-3) -> tuple[np.ndarray, ...]:
    param, grad, exp_avg = rng.standard_normal((3, count))
    return (
        param,
        grad * size,
        exp_avg * size,
        rng.standard_normal(count) ** 2 * size**2,
        np.array(rng.uniform(0.3, 1)),
    )


def _states(rng: np.random.Generator) -> Iterator[Sample]:
    for count, size, step, decay in [
        (7, 1e-3, 1, 0.01),
        (1, 1.0, 1000, 0.0),
        (5171, 1e-3, 3, 0.1),
        (33, 1e-9, 2, 0.01),
    ]:
        yield Sample(_state(rng, count, size), {"lr": 1e-3, "step": step, "weight_decay": decay})
    yield Sample(_state(rng, 129), {"lr": 1e-2, "step": 4, "beta1": 0.8, "beta2": 0.95, "eps": 1e-4})
    param, *zeros = (np.full(5, v) for v in (1.0, 0.0, 0.0, 0.0))  # a parameter that was never used
    yield Sample((param, *zeros, np.array(1.0)), {"lr": 1e-3, "step": 1})


def _states_with_shadow(rng: np.random.Generator) -> Iterator[Sample]:
    for arrays, params in _states(rng):
        yield Sample((rng.standard_normal(arrays[0].shape), *arrays), params)  # what it held is of no account


def _vectors(rng: np.random.Generator) -> Iterator[Sample]:
    for count in (7, 1, 5171, 70001):
        yield Sample((rng.standard_normal(count),))


def _norms(rng: np.random.Generator) -> Iterator[Sample]:
    for norm in (0.0, 0.25, 1.0, 9.0, 1e6):
        yield Sample((np.array(norm),), {"max_norm": 1.0})
    yield Sample((np.array(1e-10),), {"max_norm": 2e-6})  # as small as the constant beside the norm


def _draw_state(draw: Drawing, count: int = 2**20) -> Sample:
    numbers = {"lr": 1e-2, "step": draw.among(1, 3, 1000), "weight_decay": draw.among(0.1, 0.0)}
    moments = draw.floats(count) * 1e-3, draw.positive(count) * 1e-6
    return Sample(
        (draw.floats(count), draw.floats(count) * 1e-3, *moments, np.array(draw.rng.uniform(0.3, 1))), numbers
    )


def _draw_state_with_shadow(draw: Drawing, count: int = 2**20) -> Sample:
    arrays, numbers = _draw_state(draw, count)
    return Sample((draw.rng.standard_normal(count), *arrays), numbers)


def _bench(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample(_state(rng, 12 * size.hidden * size.hidden), {"lr": 1e-3, "step": 3})  # one layer's matrices


def _bench_shadow(rng: np.random.Generator, size: BertSize) -> Sample:
    arrays, params = _bench(rng, size)
    return Sample((arrays[0].copy(), *arrays), params)


adamw = Op(
    "adamw",
    _adamw,
    samples=_states,
    draw=_draw_state,
    bench=_bench,
    writes=(0, 2, 3),
    wide_inputs=(0, 2, 3, 4),
    wide_outputs=(0, 1, 2),
)
adamw_shadow = Op(
    "adamw_shadow",
    _adamw_shadow,
    samples=_states_with_shadow,
    draw=_draw_state_with_shadow,
    bench=_bench_shadow,
    writes=(0, 1, 3, 4),
    wide_inputs=(1, 3, 4, 5),
    wide_outputs=(1, 2, 3),
)
square_norm = Op(
    "square_norm",
    _square_norm,
    samples=_vectors,
    draw=lambda draw, count=2**20: Sample((draw.floats(count),)),
    bench=lambda rng, size: Sample((rng.standard_normal(12 * size.hidden * size.hidden),)),
    vjp=lambda run, g, outs, x: (run(mul, run(scale, x, factor=2.0), g),),
    wide_outputs=(0,),
)
clip_scale = Op(
    "clip_scale",
    _clip_scale,
    samples=_norms,
    draw=lambda draw: Sample((draw.positive(),), {"max_norm": draw.among(1.0, 0.1, 5.0)}),
    bench=lambda rng, size: Sample((np.array(4.0),), {"max_norm": 1.0}),
    wide_inputs=(0,),
    wide_outputs=(0,),
)
