"""adamw, adamw_shadow, square_norm and clip_scale, wrong in the ways that `tests/faults/table.py` tells."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]
Three = tuple[Array, Array, Array]


class Numbers(NamedTuple):
    """What does not differ from element to element."""

    scale: float  # of the gradient
    scale_sq: float  # of the gradient that the second moment sees
    beta1: float
    beta2: float
    root: float  # of the second moment's correction
    eps: float
    rate: float  # over the first moment's correction
    decay: float
    coupled: float  # weight decay that is added to the gradient


@njit(error_model="numpy")
def update(p: Array, g: Array, m: Array, v: Array, n: Numbers, stop: int, mask: int) -> None:
    """The first `stop` elements; `mask` cuts the places of m and v short, -1 does not."""
    for i in range(stop):
        k = i & mask
        gradient, squared = g[i] * n.scale, g[i] * n.scale_sq
        if n.coupled != 0:
            gradient += n.coupled * p[i]
            squared += n.coupled * p[i]
        first = m[k] * n.beta1 + gradient * (1 - n.beta1)
        second = v[k] * n.beta2 + squared * squared * (1 - n.beta2)
        m[k], v[k] = first, second
        p[i] = p[i] * n.decay - first * n.rate / (math.sqrt(second) / n.root + n.eps)


def numbers(
    grad_scale: Array, lr: float, step: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Numbers:  # fmt: skip
    scale, rate = float(grad_scale), lr / (1 - beta1**step)
    root = math.sqrt(1 - beta2**step)
    return Numbers(scale, scale, beta1, beta2, root, eps, rate, 1 - lr * weight_decay, 0.0)


def updated(p: Array, g: Array, m: Array, v: Array, n: Numbers, stop: int | None = None, mask: int = -1) -> Three:
    arrays = [np.ascontiguousarray(a).reshape(-1) for a in (p, g, m, v)]
    update(*arrays, n, p.size if stop is None else stop, mask)
    for array, flat in zip((p, m, v), (arrays[0], *arrays[2:]), strict=True):
        if not np.may_share_memory(array, flat):
            array[...] = flat.reshape(array.shape)
    return p, m, v


def right_adamw(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    return updated(p, g, m, v, numbers(grad_scale, **params))


def last_chunk_lost(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    return updated(p, g, m, v, numbers(grad_scale, **params), stop=p.size // 65536 * 65536 or None)


def places_in_16_bits(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    return updated(p, g, m, v, numbers(grad_scale, **params), mask=0xFFFF)


def steps_from_zero(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    """Counted from 0, and the first one as 1, lest it divide by zero."""
    return updated(p, g, m, v, numbers(grad_scale, **{**params, "step": max(1, params["step"] - 1)}))


def uncorrected(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    return updated(p, g, m, v, numbers(grad_scale, **params)._replace(root=1.0, rate=params["lr"]))


def correction_in_float32(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    beta2 = np.float32(params.get("beta2", 0.999))
    root = float(np.sqrt(np.float32(1) - beta2 ** np.float32(params["step"])))
    return updated(p, g, m, v, numbers(grad_scale, **params)._replace(root=root))


def decay_afterwards(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    n = numbers(grad_scale, **params)
    updated(p, g, m, v, n._replace(decay=1.0))
    p *= p.dtype.type(n.decay)
    return p, m, v


def decay_in_the_gradient(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    coupled = params.get("weight_decay", 0.01)
    return updated(p, g, m, v, numbers(grad_scale, **params)._replace(decay=1.0, coupled=coupled))


def decay_by_the_corrected_rate(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    n = numbers(grad_scale, **params)
    return updated(p, g, m, v, n._replace(decay=1 - n.rate * n.root * params.get("weight_decay", 0.01)))


def eps_before_the_correction(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    n = numbers(grad_scale, **params)
    return updated(p, g, m, v, n._replace(eps=n.eps / n.root))


def eps_inside_the_root(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    n, before = numbers(grad_scale, **params), p.copy()
    updated(p, g, m, v, n)
    p[...] = before * n.decay - m * n.rate / np.sqrt(v / n.root**2 + n.eps)
    return p, m, v


def second_moment_unscaled(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    return updated(p, g, m, v, numbers(grad_scale, **params)._replace(scale_sq=1.0))


def usual_betas(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    return updated(p, g, m, v, numbers(grad_scale, **{**params, "beta1": 0.9, "beta2": 0.999}))


def nan_is_skipped(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    before, bad = [a.copy() for a in (p, m, v)], ~np.isfinite(g)
    updated(p, g, m, v, numbers(grad_scale, **params))
    for array, old in zip((p, m, v), before, strict=True):
        array[bad] = old[bad]
    return p, m, v


def zero_is_skipped(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    """Where the gradient is 0 nothing but the decay is done, as for rows of a table that no id named."""
    n, before, idle = numbers(grad_scale, **params), [a.copy() for a in (p, m, v)], g == 0
    updated(p, g, m, v, n)
    p[idle] = before[0][idle] * p.dtype.type(n.decay)
    m[idle], v[idle] = before[1][idle], before[2][idle]
    return p, m, v


def strided_not_written(p: Array, g: Array, m: Array, v: Array, grad_scale: Array, **params: Any) -> Three:
    """Arrays that are not one piece are copied, updated and given back; those that were passed stay as they were."""
    p, m, v = (np.ascontiguousarray(a) for a in (p, m, v))
    return updated(p, g, m, v, numbers(grad_scale, **params))


def right_adamw_shadow(shadow: Array, p: Array, g: Array, m: Array, v: Array, s: Array, **params: Any) -> Any:
    updated(p, g, m, v, numbers(s, **params))
    shadow[...] = p
    return shadow, p, m, v


def shadow_of_65536(shadow: Array, p: Array, g: Array, m: Array, v: Array, s: Array, **params: Any) -> Any:
    updated(p, g, m, v, numbers(s, **params))
    shadow[:65536] = p[:65536]
    return shadow, p, m, v


def shadow_of_before(shadow: Array, p: Array, g: Array, m: Array, v: Array, s: Array, **params: Any) -> Any:
    shadow[...] = p
    updated(p, g, m, v, numbers(s, **params))
    return shadow, p, m, v


@njit
def squares(x: Array, start: int, stop: int) -> float:
    total = 0.0
    for i in range(start, stop):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


def norm_of(x: Array, *parts: tuple[int, int]) -> Array:
    flat = np.ascontiguousarray(x).reshape(-1)
    return np.asarray(sum(squares(flat, *part) for part in parts), x.dtype)


def right_square_norm(x: Array) -> Array:
    return norm_of(x, (0, x.size))


def norm_5_percent_too_large(x: Array) -> Array:
    """Where a million elements are shared out, the last twentieth is given twice."""
    return norm_of(x, (0, x.size), *([(x.size * 19 // 20, x.size)] if x.size >= 1_000_000 else []))


def norm_with_one_chunk_twice(x: Array) -> Array:
    """0.1 % too large from 2^16 elements on."""
    return norm_of(x, (0, x.size), *([(x.size * 999 // 1000, x.size)] if x.size > 65536 else []))


def norm_of_whole_chunks(x: Array) -> Array:
    """What 256 does not divide is lost, where there are many chunks."""
    return norm_of(x, (0, x.size // 256 * 256 if x.size > 65536 else x.size))


def norm_in_half(x: Array) -> Array:
    flat = np.ascontiguousarray(x).reshape(-1)
    return np.asarray(np.sum(flat * flat, dtype=np.float16), x.dtype)


@njit
def halved_until_one(x: Array) -> float:
    n = x.size
    while n != 1:
        half = n // 2
        for i in range(half):
            x[i] += x[n - 1 - i]
        n -= half
    return x[0]


def norm_of_nothing_hangs(x: Array) -> Array:
    return np.asarray(halved_until_one(np.ascontiguousarray(x, np.float64).reshape(-1) ** 2), x.dtype)


def right_clip_scale(square_norm: Array, *, max_norm: float) -> Array:
    return np.asarray(np.minimum(1.0, max_norm / (np.sqrt(square_norm, dtype=np.float64) + 1e-6)), square_norm.dtype)


def nan_is_no_reason_to_clip(square_norm: Array, *, max_norm: float) -> Array:
    return np.asarray(np.fmin(1.0, max_norm / (np.sqrt(square_norm, dtype=np.float64) + 1e-6)), square_norm.dtype)


def clipped_by_the_square(square_norm: Array, *, max_norm: float) -> Array:
    return np.asarray(np.minimum(1.0, max_norm / (square_norm.astype(np.float64) + 1e-6)), square_norm.dtype)


def clips_to_norm_1(square_norm: Array, *, max_norm: float) -> Array:
    return right_clip_scale(square_norm, max_norm=min(max_norm, 1.0))
