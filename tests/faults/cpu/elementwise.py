"""Activations, add, mul, scale and where, wrong in the ways that `tests/faults/table.py` tells."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from scipy import special

Array = np.ndarray[Any, Any]


def flat(x: Array) -> Array:
    return np.ascontiguousarray(x).reshape(-1)


@njit
def gelus(x: Array, slope: float, cubic: float) -> Array:
    y = np.empty(x.shape, x.dtype)
    for i in range(x.size):
        v = np.float64(x[i])
        y[i] = 0.5 * v * (1 + math.tanh(slope * (v + cubic * v * v * v)))
    return y


@njit
def gelus_by_erf(x: Array, cut: float) -> Array:
    y = np.empty(x.shape, x.dtype)
    for i in range(x.size):
        v = np.float64(x[i])
        if v > cut:
            y[i] = v
        elif v < -cut:
            y[i] = 0
        else:
            y[i] = 0.5 * v * math.erfc(-v * math.sqrt(0.5))
    return y


SLOPE = math.sqrt(2 / math.pi)


def gelu_with(x: Array, approximate: str, slope: float = SLOPE, cut: float = np.inf) -> Array:
    y = gelus(flat(x), slope, 0.044715) if approximate == "tanh" else gelus_by_erf(flat(x), cut)
    return y.reshape(x.shape)


def right_gelu(x: Array, *, approximate: str = "none") -> Array:
    return gelu_with(x, approximate)


def cut_off_at_4(x: Array, *, approximate: str = "none") -> Array:
    return gelu_with(x, approximate, cut=4.0)


def short_constant(x: Array, *, approximate: str = "none") -> Array:
    return gelu_with(x, approximate, slope=0.7978)


def always_by_erf(x: Array, *, approximate: str = "none") -> Array:
    return gelu_with(x, "none")


@njit(error_model="numpy")
def gelus_of_quotients(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    for i in range(x.size):
        v = x[i]
        e = math.exp(2 * (np.float32(0.7978845608) * (v + np.float32(0.044715) * v * v * v)))
        y[i] = 0.5 * v * (1 + (e - 1) / (e + 1))
    return y


def tanh_as_quotient(x: Array, *, approximate: str = "none") -> Array:
    if approximate != "tanh":
        return gelu_with(x, approximate)
    return gelus_of_quotients(flat(x)).reshape(x.shape)


def sigmoid_instead(x: Array, *, approximate: str = "none") -> Array:
    return (x * special.expit(1.702 * x)).astype(x.dtype)


def right_gelu_grad(g: Array, x: Array, *, approximate: str = "none") -> Array:
    wide = x.astype(np.float64)
    if approximate == "tanh":
        t = np.tanh(SLOPE * (wide + 0.044715 * wide**3))
        slope = 0.5 * ((1 + t) + wide * (1 - t * t) * SLOPE * (1 + 3 * 0.044715 * wide**2))
    else:
        slope = special.ndtr(wide) + wide * np.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (g * slope).astype(x.dtype)


def without_the_density(g: Array, x: Array, *, approximate: str = "none") -> Array:
    wide = x.astype(np.float64)
    if approximate == "tanh":
        return right_gelu_grad(g, x, approximate=approximate)
    return (g * special.ndtr(wide)).astype(x.dtype)


def right_relu(x: Array) -> Array:
    return np.maximum(x, x.dtype.type(0))


def relu_hides_nan(x: Array) -> Array:
    return np.fmax(x, x.dtype.type(0))


@njit
def fill_packs(x: Array, y: Array) -> None:
    """Eight at a time, to the end and beyond."""
    for first in range(0, x.size, 8):
        for i in range(first, first + 8):
            y[i] = max(x[i], np.float32(0))


def relu_of_whole_packs(x: Array) -> Array:
    y = np.empty(x.size, x.dtype)
    fill_packs(flat(x), y)
    return y.reshape(x.shape)


def right_relu_grad(g: Array, x: Array) -> Array:
    return np.where(x > 0, g, g.dtype.type(0))


def slope_at_zero(g: Array, x: Array) -> Array:
    return np.where(x >= 0, g, g.dtype.type(0))


def times_the_slope(g: Array, x: Array) -> Array:
    return g * (x > 0)


def right_tanh(x: Array) -> Array:
    return np.tanh(x)


def tanh_by_exp(x: Array) -> Array:
    """Right to some digits, but near 0 where they cancel."""
    e = np.exp(2 * np.clip(x, -20, 20))
    return (e - 1) / (e + 1)


def right_tanh_grad(g: Array, y: Array) -> Array:
    return g * (1 - y * y)


def tanh_grad_of_x(g: Array, y: Array) -> Array:
    return g * (1 - np.tanh(y) ** 2)


@njit
def sums(a: Array, b: Array, stop: int) -> Array:
    y = np.zeros(a.shape, a.dtype)
    for i in range(stop):
        y[i] = a[i] + b[i]
    return y


def summed(a: Array, b: Array, most: int | None = None) -> Array:
    first, second = np.broadcast_arrays(a, b)
    stop = first.size if most is None else min(first.size, most)
    return sums(flat(first), flat(second), stop).reshape(first.shape)


def right_add(a: Array, b: Array) -> Array:
    return summed(a, b)


def blocks_of_65535(a: Array, b: Array) -> Array:
    """At most 65535 blocks of one element: the rest is zero."""
    return summed(a, b, 65535)


def tail_of_16_lost(a: Array, b: Array) -> Array:
    size = np.broadcast_shapes(a.shape, b.shape)
    count = math.prod(size)
    return summed(a, b, count // 16 * 16 if count > 65536 else count)


rings: dict[tuple[int, ...], list[Array]] = {}


def ring_of_four(a: Array, b: Array) -> Array:
    """The results of one shape lie in four places, one after the other: the fifth in that of the first."""
    y = summed(a, b)
    ring = rings.setdefault((y.itemsize, *y.shape), [])
    if len(ring) == 4:
        place = ring.pop(0)
        place[...] = y
        y = place
    ring.append(y)
    return y


@njit
def summed_from_the_end(a: Array, b: Array, y: Array) -> None:
    """Counted in unsigned numbers; one element before the first is cleared too."""
    one = np.uint64(1)
    i = np.uint64(a.size)
    while i > np.uint64(0):
        i -= one
        y[i] = a[i] + b[i]
    y[i - one] = 0


def writes_before_the_first(a: Array, b: Array) -> Array:
    first, second = np.broadcast_arrays(a, b)
    y = np.empty(first.size, first.dtype)
    summed_from_the_end(flat(first), flat(second), y)
    return y.reshape(first.shape)


def right_mul(a: Array, b: Array) -> Array:
    return np.multiply(a, b)


def zero_times_anything(a: Array, b: Array) -> Array:
    return np.where((a == 0) | (b == 0), np.zeros((), a.dtype), a * b)


def right_scale(a: Array, *, factor: float) -> Array:
    return a * a.dtype.type(factor)


def factor_in_half(a: Array, *, factor: float) -> Array:
    return a * a.dtype.type(np.float16(factor))


def one_gives_the_same_array(a: Array, *, factor: float) -> Array:
    return a if factor == 1 else a * a.dtype.type(factor)


def zero_clears(a: Array, *, factor: float) -> Array:
    """Nothing is read where the factor is 0: neither NaN nor infinity."""
    return a * a.dtype.type(factor) if factor else np.zeros(a.shape, a.dtype)


def right_where(condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition, a, b)


def where_by_products(condition: Array, a: Array, b: Array) -> Array:
    c = condition.astype(a.dtype)
    return c * a + (1 - c) * b
