"""gelu, relu and their gradients, and that of tanh: one loop over the elements each; tanh by NumPy's."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np

from minibert.kernels.activation import CUBIC, SQRT_2_OVER_PI
from minibert.kernels.cpu.arrays import empty_on_lines, flat
from minibert.kernels.cpu.bfloat16 import bits_of, loaded, stored
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import constant, erf, exp, vmax
from minibert.kernels.cpu.math import tanh as tanh_of
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.op import Array, library, takes_bfloat16

LIGHT, HEAVY = rows_worth_a_thread(1, cost=0.1), rows_worth_a_thread(1, cost=0.5)  # elements, without and with erf


@jit
def gelu_erf_loop(x: Array, y: Array, start: int, stop: int) -> None:
    x, y = x[start:stop], y[start:stop]
    like = loaded(x[0])
    half, one, root = constant(0.5, like), constant(1.0, like), constant(sqrt(0.5), like)
    for i in range(x.size):
        v = loaded(x[i])
        y[i] = stored(v * half * (one + erf(v * root)), y)


@jit
def gelu_tanh_loop(x: Array, y: Array, start: int, stop: int) -> None:
    x, y = x[start:stop], y[start:stop]
    like = loaded(x[0])
    half, one = constant(0.5, like), constant(1.0, like)
    slope, cubic = constant(SQRT_2_OVER_PI, like), constant(CUBIC, like)
    for i in range(x.size):
        v = loaded(x[i])
        y[i] = stored(v * half * (one + tanh_of(slope * (v + cubic * v * v * v))), y)


@takes_bfloat16
def gelu(x: Array, *, approximate: str = "none") -> Array:
    y = empty_on_lines(x.shape, x.dtype)
    (vector,) = flat(bits_of(x))
    loop = gelu_tanh_loop if approximate == "tanh" else gelu_erf_loop
    run_rows(loop, x.size, vector, bits_of(y).reshape(-1), grain=HEAVY)
    return y


@jit
def gelu_erf_grad_loop(g: Array, x: Array, dx: Array, start: int, stop: int) -> None:
    g, x, dx = g[start:stop], x[start:stop], dx[start:stop]
    like = loaded(x[0])
    half, one, root = constant(0.5, like), constant(1.0, like), constant(sqrt(0.5), like)
    density = constant(sqrt(0.5 / pi), like)
    for i in range(x.size):
        v = loaded(x[i])
        slope = half * (one + erf(v * root)) + v * density * exp(-half * v * v)
        dx[i] = stored(loaded(g[i]) * slope, dx)


@jit
def gelu_tanh_grad_loop(g: Array, x: Array, dx: Array, start: int, stop: int) -> None:
    g, x, dx = g[start:stop], x[start:stop], dx[start:stop]
    like = loaded(x[0])
    half, one, far = constant(0.5, like), constant(1.0, like), constant(20.0, like)
    slope, cubic, cubic3 = constant(SQRT_2_OVER_PI, like), constant(CUBIC, like), constant(3 * CUBIC, like)
    for i in range(x.size):
        v = loaded(x[i])
        t = tanh_of(slope * (v + cubic * v * v * v))
        near = vmax(-far, -vmax(-far, -v))  # beyond it 1 - t t is 0, and a product of powers of v would overflow
        steep = half * ((one + t) + near * (one - t * t) * slope * (one + cubic3 * near * near))
        dx[i] = stored(loaded(g[i]) * steep, dx)


@takes_bfloat16
def gelu_grad(g: Array, x: Array, *, approximate: str = "none") -> Array:
    dx = empty_on_lines(x.shape, x.dtype)
    loop = gelu_tanh_grad_loop if approximate == "tanh" else gelu_erf_grad_loop
    run_rows(loop, x.size, *flat(bits_of(g), bits_of(x)), bits_of(dx).reshape(-1), grain=HEAVY)
    return dx


@jit
def relu_loop(x: Array, y: Array, start: int, stop: int) -> None:
    x, y = x[start:stop], y[start:stop]
    zero = x.dtype.type(0)
    for i in range(x.size):
        y[i] = vmax(x[i], zero)


def relu(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    (vector,) = flat(x)
    run_rows(relu_loop, x.size, vector, y.reshape(-1), grain=LIGHT)
    return y


@jit
def relu_grad_loop(g: Array, x: Array, dx: Array, start: int, stop: int) -> None:
    g, x, dx = g[start:stop], x[start:stop], dx[start:stop]
    zero = g.dtype.type(0)
    for i in range(x.size):
        gradient = g[i]  # read first, so that the choice is a blend
        dx[i] = gradient if x[i] > zero else zero


def relu_grad(g: Array, x: Array) -> Array:
    dx = np.empty(x.shape, g.dtype)
    run_rows(relu_grad_loop, x.size, *flat(g, x), dx.reshape(-1), grain=LIGHT)
    return dx


@library
def tanh(x: Array) -> Array:
    return np.tanh(x)  # its vector loop is faster than one by `tanh_of`


@jit
def tanh_grad_loop(g: Array, y: Array, dx: Array, start: int, stop: int) -> None:
    g, y, dx = g[start:stop], y[start:stop], dx[start:stop]
    one = y.dtype.type(1)
    for i in range(y.size):
        dx[i] = g[i] * (one - y[i] * y[i])


def tanh_grad(g: Array, y: Array) -> Array:
    dx = np.empty(y.shape, y.dtype)
    run_rows(tanh_grad_loop, y.size, *flat(g, y), dx.reshape(-1), grain=LIGHT)
    return dx
